"""The furniture of `10_memory_breakdown`: checks that name mistakes, and its explorer in both of its
forms.
"""

import math
from itertools import accumulate

import pytest

from labkit.lab.check import breakdown as check
from labkit.lab.explore import breakdown as explore
from labkit.memory.formulas import plan
from tests.lab import exercise_checks, explorers


def peak(events):
    live = list(accumulate(events))
    return [max(live), max(range(len(live)), key=live.__getitem__)]


def keeps(tokens, d_in, d_out, trains, rank):
    return 4 * tokens * (d_in + rank if trains or rank else 0)


def crossover(n, others, bits, extra):
    t = 1
    lora, qlora = 2 * (n + others), n * bits / 8 + 4 * others
    while qlora + t * extra <= lora:
        t += 1
    return t


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.peak_of_events,
        peak,
        [
            (lambda e: [sum(e), len(e) - 1], "live at the end"),
            (lambda e: [sum(max(x, 0) for x in e), peak(e)[1]], "nothing was ever released"),
            (lambda e: [max(e), e.index(max(e))], "largest single"),
            (lambda e: [peak(e)[0], peak(e)[1] + 1], "from 0"),
            (lambda e: peak(e)[0], "return both"),
            (lambda e: list(reversed(peak(e))), "bytes first"),
        ],
    )
    yield (
        check.linear_keeps,
        keeps,
        [
            (lambda t, i, o, trains, r: 4 * t * (i + r), "needs no input"),
            (lambda t, i, o, trains, r: 4 * t * (i * trains + r), "keeps its whole input x"),
            (lambda t, i, o, trains, r: 4 * t * i * bool(trains or r), "z = A x"),
            (lambda t, i, o, trains, r: 4 * t * (o * bool(trains or r) + r), "what goes \\*in\\*"),
            (lambda t, i, o, trains, r: 4 * t * (i * trains + (2 * i + r) * bool(r)), "kept once"),
            (lambda t, i, o, trains, r: 4 * t * (i * bool(trains) + i * bool(r) + r), "kept once"),
            (lambda *a: keeps(*a) // 4, "4 bytes per number"),
            (lambda t, i, o, trains, r: 4 * (i * o if trains else r * (i + o)), "grow with the tokens"),
        ],
    )
    yield (
        check.checkpoint_bytes,
        lambda n, k, i, b: -(-n // k) * i + k * b,
        [
            (lambda n, k, i, b: -(-n // k) * i, "runs again in the backward pass"),
            (lambda n, k, i, b: n * i + k * b, "not of each block"),
            (lambda n, k, i, b: n // k * i + k * b, "last segment"),
            (lambda n, k, i, b: n / k * i + k * b, "whole numbers"),
            (lambda n, k, i, b: -(-n // k) * i + b, "not one block"),
            (lambda n, k, i, b: -(-n // k) * i + n * b, "one after the other"),
            (lambda n, k, i, b: k * i + -(-n // k) * b, "other way round"),
        ],
    )
    yield (
        check.step_flops,
        lambda n, t, trains, again: n * t * (4 + 2 * trains + 2 * again),
        [
            (lambda n, t, trains, again: n * t * (2 + trains + again), "two operations"),
            (lambda n, t, trains, again: n * t * (6 + 2 * again), "two products, not three"),
            (lambda n, t, trains, again: n * t * (2 + 4 * trains + 2 * again), "must flow"),
            (lambda n, t, trains, again: n * t * (4 + 2 * trains), "one more product"),
            (
                lambda n, t, trains, again: n * t * (4 + 2 * trains) + again * n * t * (2 + 2 * trains),
                "not the backward",
            ),
            (lambda n, t, trains, again: n * t * (4 + 2 * trains) * (1 + again / 3), "a third more is right"),
            (lambda n, t, trains, again: 2 * n * t, "forward pass alone"),
        ],
    )
    yield (
        check.crossover_tokens,
        crossover,
        [
            (lambda n, o, b, e: math.floor(n * (2 - b / 8) / e) + 1, "enlarges weights too"),
            (lambda n, o, b, e: math.floor((n * (2 - b / 8) - 4 * o) / e) + 1, "adds 2, not 4"),
            (lambda n, o, b, e: math.floor((n * (16 - b) - 2 * o) / e) + 1, "divide by 8"),
            (lambda n, o, b, e: math.floor((n * (4 - b / 8) - 2 * o) / e) + 1, "not in fp32"),
            (lambda n, o, b, e: math.floor((n * b / 8 + 2 * o) / e) + 1, "difference from bf16"),
            (lambda n, o, b, e: math.floor((n * (2 - b / 8) + 2 * o) / e) + 1, "subtract it"),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The explorer


@pytest.fixture(scope="module")
def explorer():
    return explorers.Explorer(explore, explore.peak_explorer)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_explorer_draws_the_peak_that_plan_predicts(explorer, method):
    step = dict(max_length=128, batch_size=2, checkpointing=True, logits="all", supervised=0.5)
    figure = explorer.figure(model="tiny-llama", method=method, **step)
    ledger = plan("tiny-llama", method, **step)
    widths = sum(bar.get_width() for bar in figure.axes[0].patches)
    assert widths == pytest.approx(ledger.peak / 1e9, rel=1e-6)
    assert ledger.moment in explorers.title(figure)


def test_the_right_side_of_the_explorer_is_the_peak_over_the_lengths(explorer):
    figure = explorer.figure(model="tiny-llama", method="lora", max_length=128, batch_size=1)
    top = figure.axes[1].lines[0]
    for length, peak_gb in zip(top.get_xdata(), top.get_ydata()):
        ledger = plan("tiny-llama", "lora", max_length=int(length), batch_size=1, **explore.STATIC_REST)
        assert peak_gb == pytest.approx(ledger.peak / 1e9)
    assert max(top.get_xdata()) == 512, "as far as the model's positions go"


def test_the_explorer_says_when_an_example_is_too_long_for_the_model(explorer):
    figure = explorer.figure(model="tiny-llama", method="lora", max_length=4096)
    assert "512" in explorers.title(figure) + "".join(text.get_text() for text in figure.axes[0].texts)


def test_headless_the_explorer_draws_static_figures():
    assert len(explorers.shown(explore, explore.peak_explorer)) == 2


def test_the_explorer_has_a_control_for_each_argument():
    explorer = explorers.Explorer(explore, explore.peak_explorer, interactive=True)
    assert set(explorer.controls) == set(explorer.static[0])


def test_casting_the_rest_to_fp32_and_a_card_are_drawn(explorer):
    plain, cast = (
        explorer.figure(model="smollm2-135m", method="qlora", cast_rest=on, card=24) for on in (False, True)
    )
    assert [line for line in cast.axes[1].lines if set(line.get_ydata()) == {24}]
    length = [sum(bar.get_width() for bar in figure.axes[0].patches) for figure in (plain, cast)]
    settings = dict(max_length=2048, batch_size=1, dtype="fp32", compute_dtype="bf16", **explore.STATIC_REST)
    assert length[1] == pytest.approx(plan("smollm2-135m", "qlora", **settings).peak / 1e9)
    assert length[0] < length[1]
