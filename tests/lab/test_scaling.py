"""The furniture of `17_scaling_out`: checks that name mistakes, pictures, and the explorer of the wire."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from labkit import memory
from labkit.lab import figures
from labkit.lab.check import scaling as check
from labkit.lab.explore import scaling as explore
from tests.lab import exercise_checks, explorers


def token_mean(gradients, tokens):
    """By an average of rows, where the check sums up."""
    return torch.from_numpy(np.average(torch.stack(gradients).numpy(), axis=0, weights=tokens))


def both_ways(weights, adapters, ranks, rounds=2, gathers=2):
    """As shares of what stays."""
    leaves = 1 - 1 / ranks
    return rounds * leaves * adapters, leaves * (gathers * weights + adapters)


def of_layer(x, W, A, B, s, rank, ranks, layout, scale=1.0):
    """By cutting the dense update."""
    whole, update = W, scale * s * B @ A
    if layout == "column":
        return (x @ (whole + update).T).chunk(ranks, 1)[rank]
    columns = torch.arange(x.shape[1]).chunk(ranks)[rank]
    return x[:, columns] @ (whole + update)[:, columns].T


def held(blocks, block, root, adapters, ranks, gathered=2, rooted=1):
    return (blocks * block + root + 4 * adapters) / ranks + gathered * block + rooted * root


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.shared_gradient,
        token_mean,
        [
            (lambda g, t: torch.stack(g).mean(0), "a mean of means"),
            (lambda g, t: torch.stack(g).sum(0), "the sum over the ranks"),
            (lambda g, t: token_mean(g, t) * sum(t), "divide by the tokens of all"),
            (lambda g, t: token_mean(g, t) / len(t), "once more than the mean"),
            (lambda g, t: token_mean(g, t) * sum(t) / len(t), "not by the number of ranks"),
        ],
    )
    yield (
        check.sent_per_rank,
        both_ways,
        [
            (lambda *a: both_ways(*a, rounds=1), "two rounds"),
            (lambda *a: both_ways(*a, gathers=1), "gathers a block twice"),
            (lambda w, a, n: tuple(n * one for one in both_ways(w, a, n)), "all ranks send together"),
            (lambda w, a, n: (2 * a, 2 * w + a), r"\(N - 1\) / N"),
            (lambda *a: both_ways(*a)[::-1], r"order is \(DDP, FSDP\)"),
            (lambda w, a, n: (both_ways(w, a, n)[0], 3 * (n - 1) / n * a), "frozen weights are gathered too"),
        ],
    )
    yield (
        check.layer_part,
        of_layer,
        [
            (lambda *a: of_layer(*a[:-1], "row" if a[-1] == "column" else "column"), "other way round"),
            (lambda *a: of_layer(*a, scale=0.0), "the adapter is missing"),
            (lambda *a: of_layer(*a, scale=1 / a[6]), "not averaged"),
            (lambda *a: of_layer(*a[:4], 1.0, *a[5:]), "scaling s is missing"),
            (lambda x, W, A, B, s, *_: x @ (W + s * B @ A).T, "whole layer"),
            (lambda *a: of_layer(*a[:5], 0, *a[6:]), "another rank"),
            (
                lambda x, W, A, B, s, *rest: (
                    of_layer(x, W, A, B, 0.0, *rest)
                    + (s * x @ (B @ A).T if rest[-1] == "row" else of_layer(x, 0 * W, A, B, s, *rest))
                ),
                "whole. update",
            ),
        ],
    )
    yield (
        check.rank_memory,
        held,
        [
            (lambda *a: held(*a, gathered=0, rooted=0), "is missing: a rank borrows"),
            (lambda *a: held(*a, rooted=0), "root is gathered too"),
            (lambda *a: held(*a, gathered=1), "two blocks are there"),
            (lambda n, b, root, a, ranks: held(n, b, root, a / 4, ranks), "gradients and moments"),
            (
                lambda n, b, root, a, ranks: held(n, b, root, a * ranks, ranks),
                "divided among the ranks as well",
            ),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The explorer

STEP = {
    "model": "llama-2-7b",
    "cards": 2,
    "link": "pcie 4.0 x16",
    "r": 16,
    "bits": "NF4",
    "tokens": 1024,
    "teraflops": 150,
}


def test_what_the_wire_costs_is_what_the_formulas_say():
    """QLoRA, section 3: 4.127 bits a weight; adapters of rank 16 on all linear layers of a 7B: 40 M (PEFT's count)."""
    times = explore.lost_times(**STEP)
    computing, wire = times["LoRA, DDP"]
    assert wire == pytest.approx(4 * 39_976_960 / 31.5e9)
    assert computing == pytest.approx(1024 * 6 * 6_738_415_616 / 150e12)
    sixteen, four = (explore.lost_times(**STEP | {"bits": bits})["LoRA, FSDP"][1] for bits in ("bf16", "NF4"))
    assert 3 < sixteen / four < 3.88
    assert times["full, DDP"][1] == pytest.approx(2 * 6_738_415_616 / 31.5e9)


def show():
    explore.wire_explorer([STEP])


def test_the_explorer_draws_headless_and_for_every_value_of_its_controls():
    (figure,) = explorers.shown(explore, show)
    assert "llama-2-7b, 2 cards" in explorers.title(figure)
    explorer = explorers.Explorer(explore, show, interactive=True)
    assert set(explorer.controls) == set(STEP)
    assert "64 cards" in explorers.title(
        explorer.figure_at_controls() and explorer.figure(cards=64, link="nvlink 4 (H100)")
    )
    slow = explorer.figure(model="llama-2-70b", link="ethernet, 10 Gbit/s", bits="bf16", tokens=256)
    assert any("lost" in text.get_text() for text in slow.axes[0].texts)


# Pictures


def test_the_pictures_draw_what_they_are_given():
    ledger = memory.plan("data/tiny-llama", ranks=2, shard="all", device="cpu")
    bars = figures.rank_bars(
        {"QLoRA": {"whole": memory.plan("data/tiny-llama", device="cpu"), "sharded": ledger}}
    )
    assert len(bars.axes[0].patches) == 2 * 2 * 5
    wire = figures.wire_bars({"DDP": 1000, "FSDP": 2000}, {"DDP": 1000, "FSDP": 2000}, "wire")
    assert [text.get_text() for text in wire.texts] == ["1,000 B", "2,000 B"]
    curves = figures.rank_curves({"70B": {1: 48.0, 2: 28.0, 8: 12.0}}, "peaks")
    assert curves.get_xlabel() == "ranks"
    gap = figures.gap_bars(
        {"plain": [("plan", 28.0, "plan"), ("scales", 0.5, "fact")]}, {"plain": 35.6}, "gap"
    )
    assert "7.1" in [text.get_text() for text in gap.texts]
    spans = figures.worker_spans({"local": [[0, 5, False], [1, 2, True], [2, 6, False]]})
    assert [text.get_text() for text in spans.axes[0].texts] == ["killed"]
    plt.close("all")
