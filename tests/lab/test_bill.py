"""The furniture of `01_why_peft`: checks that name mistakes, and its explorer in both of its forms."""

import math

import pytest
from matplotlib import pyplot as plt
from torch import nn

from labkit.lab.check import bill as check
from labkit.lab.explore import bill as explore
from labkit.lab.figures import bill
from labkit.memory.formulas import plan
from labkit.memory.ledger import COMPONENTS, Ledger, LedgerRow
from labkit.models.shapes import config_of, known_models, meta_model
from tests.lab import exercise_checks, explorers


def state(sizes, moments=2, smallest=4096, scale=4, up=math.ceil, wide=4):
    total = 0
    for n in sizes:
        each = wide * n if n < smallest else n + scale * up(n / 256)
        total += moments * each
    return total


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.static_bytes,
        lambda n, w, g, m, master: n * (w + g + m + m + (4 if master else 0)),
        [
            (lambda n, w, g, m, master: n * (w + g + m + 4 * master), "yours counts one"),
            (lambda n, w, g, m, master: n * (w + 2 * m + 4 * master), "gradients are missing"),
            (lambda n, w, g, m, master: n * (g + 2 * m + 4 * master), "weights themselves"),
            (lambda n, w, g, m, master: n * (w + g + 4 * master), "moments are missing"),
            (lambda n, w, g, m, master: n * (w + g + 2 * m + w * master), "in fp32"),
            (
                lambda n, w, g, m, master: n * (w + g + 2 * m + 2 * master),
                "yours takes 2|whatever the weight",
            ),
            (lambda n, w, g, m, master: n * (w + g + 2 * m), "copy is missing"),
            (lambda n, w, g, m, master: n * (w + g + 2 * m + 4), "only where"),
            (lambda n, w, g, m, master: w + g + 2 * m + 4 * master, "for one parameter"),
            (lambda n, w, g, m, master: 8 * n * (w + g + 2 * m + 4 * master), "those are bits"),
        ],
    )
    yield (
        check.eight_bit_state,
        state,
        [
            (lambda s: state(s, moments=1), "yours counts one"),
            (lambda s: state(s, scale=0), "scales are missing"),
            (lambda s: state(s, scale=1), "yours counts 1"),
            (lambda s: state(s, up=int), "round up"),
            (lambda s: state(s, smallest=0), "fewer than 4096"),
            (lambda s: state([n + 0.0 for n in s], smallest=4096.5), "4096 numbers are enough"),
            (lambda s: state(s, wide=2), "yours counts 2"),
            (
                lambda s: state([sum(n for n in s if n >= 4096)]) + state([n for n in s if n < 4096]),
                "do not run on",
            ),
            (lambda s: state(s) - sum(4 * math.ceil(n / 256) for n in s if n >= 4096), "scales of its own"),
            (lambda s: 8 * sum(s), "AdamW in fp32"),
        ],
    )
    yield (
        check.step_peak,
        lambda static, gradients, kept, extra: max(static + kept + extra, static + gradients),
        [
            (lambda *parts: sum(parts), "sum of all"),
            (lambda s, g, a, t: s + a + t, "end of the forward pass; when"),
            (lambda s, g, a, t: s + g, "optimizer's step; at"),
            (lambda s, g, a, t: s + max(g, a, t), "add them before"),
            (lambda s, g, a, t: s + t + max(g, a), "are gone when"),
            (lambda s, g, a, t: s + max(g, a), "scores are missing"),
            (lambda s, g, a, t: max(g, a + t), "at every moment"),
            (lambda *parts: max(parts), "not an alternative"),
        ],
    )
    yield (
        check.largest_batch,
        lambda card, reserve, static, gradients, each: next(
            (b for b in range(1000, 0, -1) if static + max(gradients, b * each) <= card - reserve),
            0,
        ),
        [
            (lambda c, r, s, g, p: (c - s) // p if c - s >= g else 0, "reserve is not yours"),
            (lambda c, r, s, g, p: (c - r) // p, "static bytes come first"),
            (lambda c, r, s, g, p: max(0, (c - r - s) // p), "gradients have to fit"),
            (lambda c, r, s, g, p: max(0, (c - r - s - g) // p), "take turns"),
            (lambda c, r, s, g, p: math.ceil((c - r - s) / p), "round down"),
            (lambda c, r, s, g, p: (c - r - s) / p, "whole number"),
            (lambda c, r, s, g, p: 0 if 0 <= c - r - s < g else (c - r - s) // p, "cannot be negative"),
            (lambda c, r, s, g, p: max(1, (c - r - s) // p) if c - r - s >= g else 1, "not an answer"),
        ],
    )


CASES = list(right_and_wrong())


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(CASES)


def test_the_solutions_agree_with_the_ledger():
    """The exercises teach what `plan` does: the same bytes for a real model."""
    full = plan("smollm2-135m", "full", dtype="bf16", master=True)
    n = full.counts["parameters"]
    bill = full["gradients"] + full["optimizer"] + 2 * n
    assert CASES[0][1](n, 2, 2, 4, True) == bill - 4 * 272  # AdamW's step counts, 4 bytes per tensor
    adapter = plan("tiny-llama", "lora", r=16, optimizer="adamw8bit")
    sizes = [16 * side for layer in plan_linears() for side in layer]
    assert state(sizes) == adapter["optimizer"]


def plan_linears():
    """(in, out) of the linear layers of tiny-llama, counted on the meta device."""
    model = meta_model(config_of("tiny-llama"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield module.in_features, module.out_features


# The bars and the explorer


@pytest.fixture(autouse=True, scope="module")
def closed():
    yield
    plt.close("all")


def some_ledger(**bytes_of):
    return Ledger([LedgerRow(part, "x", n, n // 2) for part, n in bytes_of.items()])


def test_every_component_of_a_ledger_has_a_look():
    assert set(bill.LOOK) == set(COMPONENTS)
    assert len(set(bill.LOOK.values())) == len(COMPONENTS)


@pytest.mark.parametrize("at_peak", [True, False])
def test_a_bar_is_as_long_as_its_ledger_and_its_parts_lie_end_to_end(at_peak):
    ledgers = {
        "a": some_ledger(weights=20_000_000_000, optimizer=4_000_000_000),
        "b": some_ledger(weights=2_000_000_000, lora=30_000_000),
    }
    axes = bill.bill_bars(ledgers, "title", at_peak=at_peak)
    for y, ledger in enumerate(ledgers.values()):
        bars = sorted(
            (b for b in axes.patches if round(b.get_y() + b.get_height() / 2) == y), key=lambda b: b.get_x()
        )
        ends = [bar.get_x() + bar.get_width() for bar in bars]
        assert ends[-1] == pytest.approx((ledger.peak if at_peak else ledger.total) / 1e9)
        assert all(bar.get_x() == pytest.approx(end) for bar, end in zip(bars[1:], ends))


def test_a_line_is_drawn_for_every_card_in_reach_and_no_other():
    axes = bill.bill_bars({"a": some_ledger(weights=60_000_000_000)}, "title")
    assert [line.get_xdata()[0] for line in axes.lines] == [8, 16, 24]


def test_what_has_no_room_for_its_name_is_named_below():
    axes = bill.bill_bars({"a": some_ledger(weights=60_000_000_000, lora=900_000_000)}, "title")
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lora 0.45"]
    assert any("weights" in text.get_text() for text in axes.texts)


def test_bars_need_a_ledger():
    with pytest.raises(ValueError, match="at least one ledger"):
        bill.bill_bars({}, "title")


def test_the_verdict_keeps_the_reserve_free():
    just = some_ledger(weights=2 * 15_000_000_000)  # half of it at the peak
    assert explore.verdict(just, (8, 16, 24)) == "fits 16, 24 GB; does not fit 8 GB"
    assert explore.verdict(just, (8, 16), reserve=1.1) == "does not fit 8, 16 GB"


@pytest.fixture(scope="module")
def explorer():
    return explorers.Explorer(explore, lambda: explore.bill_explorer("smollm2-135m"))


def test_headless_it_shows_full_fine_tuning_and_qlora():
    first, second = explorers.shown(explore, lambda: explore.bill_explorer("smollm2-135m"))
    assert first.axes[0].texts and second.axes[0].texts
    expected = plan("smollm2-135m", "full", max_length=1024, batch_size=1, master=True)
    assert explore.verdict(expected) in explorers.title(first)


def test_the_bar_is_the_plan_of_what_was_chosen(explorer):
    figure = explorer.figure(method="lora", r=8, max_length=256, batch_size=4, optimizer="adamw8bit")
    expected = plan("smollm2-135m", "lora", r=8, max_length=256, batch_size=4, optimizer="adamw8bit")
    end = max(bar.get_x() + bar.get_width() for bar in figure.axes[0].patches)
    assert end == pytest.approx(expected.peak / 1e9)
    assert "lora, rank 8, 4 × 256 tokens, adamw8bit" in explorers.title(figure)


def test_the_smallest_card_that_may_hold_it_is_in_sight(explorer):
    figure = explorer.figure(model="llama-2-7b", method="qlora", checkpointing=True)
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [8]
    assert figure.axes[0].get_xlim()[1] > 8


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_the_explorer_survives_every_method_and_optimizer(explorer, method, optimizer):
    for checkpointing in (False, True):
        for mixed in (False, True):
            switches = {"checkpointing": checkpointing, "mixed": mixed}
            figure = explorer.figure(
                model="tiny-llama", max_length=256, method=method, optimizer=optimizer, **switches
            )
            said = explorers.title(figure)
            assert optimizer in said and (", checkpointing" in said) == checkpointing
            assert ("(fp32 copy)" in said) == (method == "full" and mixed)


def test_what_cannot_be_is_said_and_not_raised(explorer):
    figure = explorer.figure(model="tiny-llama", max_length=1024)
    assert "positions that this model knows" in figure.axes[0].texts[0].get_text()


def test_the_explorer_has_a_control_for_each_argument():
    explorer = explorers.Explorer(explore, explore.bill_explorer, interactive=True)
    code = explorer.draw.__code__
    assert list(explorer.controls) == list(code.co_varnames[: code.co_argcount])
    assert list(explorer.controls["model"].options) == known_models()


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="not known"):
        explore.bill_explorer("gpt-5")


def test_the_largest_batch_fits_and_one_more_does_not():
    step = {"model": "smollm2-135m", "method": "lora", "r": 8, "max_length": 512}
    most = explore.largest_batch(8, **step)
    fits = {n: plan(**step, batch_size=n).fits(8, explore.RESERVE) for n in (most, most + 1)}
    assert fits == {most: True, most + 1: False}
    assert explore.largest_batch(8, model="llama-2-7b", method="full") == 0
