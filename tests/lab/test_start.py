"""The furniture of `00_start_here`: checks that name mistakes, and the explorer of weight memory."""

import pytest

from labkit.lab.check import start as check
from labkit.lab.explore import start as explore
from tests.lab import exercise_checks, explorers

CASES = [
    (check.weight_bytes, lambda p, b: p * b / 8, [(lambda p, b: p * b, "that is bits")]),
    (
        check.training_flops,
        lambda w, t, f: (4 if f else 6) * w * t,
        [
            (lambda w, t, f: 2 * w * t, "forward pass alone"),
            (lambda w, t, f: 6 * w * t, "frozen weight needs no gradient"),
        ],
    ),
    (
        check.greedy_token,
        lambda x: int(x[-1].argmax()),
        [(lambda x: int(x[0].argmax()), "first position")],
    ),
]

(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(CASES, times=100)


def test_the_bars_of_the_explorer_are_parameters_times_bits():
    (figure,) = explorers.shown(explore, explore.weight_memory)
    assert "7B" in explorers.title(figure)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([6.7 * bits / 8 for bits in (32, 16, 8, 4.127)])


@pytest.mark.parametrize("model", explore.SIZES)
def test_the_explorer_marks_the_cards_within_reach_of_every_model(model):
    figure = explorers.Explorer(explore, explore.weight_memory).figure(model=model)
    fp32 = explore.SIZES[model] * 4 / 1e9
    cards = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert cards == [card for card in (8, 16, 24, 40, 80) if card < 1.1 * fp32]


def test_the_explorer_has_a_control_for_its_argument():
    explorer = explorers.Explorer(explore, explore.weight_memory, interactive=True)
    assert set(explorer.controls) == {"model"}
    explorer.controls["model"].value = "13B"
    assert "13B" in explorers.title(explorer.figure_at_controls())
