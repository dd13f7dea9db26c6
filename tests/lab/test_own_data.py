"""The furniture of `08b_your_data`: checks that name mistakes, results with intervals, and the explorer of records."""

import math

import pytest
import torch

from labkit.data.encoding import encode
from labkit.lab.check import own_data as check
from labkit.lab.explore import own_data as explore
from labkit.lab.figures.own_data import result_rows, written_answer
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.training.evaluate import held_out_loss
from tests.lab import exercise_checks, explorers


def near(one, other, n=3):
    sets = [set(zip(*(text.lower().split()[i:] for i in range(n)))) for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def interval(k, n, z=1.96):
    p, zz = k / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (p + zz / 2 - half) / (1 + zz), (p + zz / 2 + half) / (1 + zz)


def plain(k, n):
    half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


def steps(lengths, batch_size, minutes, tokens_per_second):
    return int(minutes * 60 * tokens_per_second * len(lengths) / sum(lengths) / batch_size)


CASES = [
    (
        check.near_copy,
        near,
        [
            (lambda a, b: near(a, b, 1), "single words"),
            (lambda a, b: near(a, b, 2), "runs of two"),
            (
                lambda a, b: len(set(check.runs(a)) & set(check.runs(b))) / len(set(check.runs(a))),
                "containment",
            ),
        ],
    ),
    (
        check.share_interval,
        interval,
        [
            (plain, "width zero after n of n"),
            (lambda k, n: interval(k, n, 1.645), "95 % on both sides takes 1.96"),
        ],
    ),
    (
        check.budget_steps,
        steps,
        [
            (lambda n, b, m, s: steps(n, b, m / 60, s), "60 seconds each"),
            (lambda n, b, m, s: steps(n, 1, m, s), "how many records fit"),
            (lambda n, b, m, s: steps(n, b, m, s) + 1, "rounded up"),
        ],
    ),
]

(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(CASES)

RECORDS = [
    {"prompt": "one $2 <b>line</b>\n", "completion": "yes, but"},
    {"prompt": "two\n", "completion": "no"},
]


def test_answers_stand_below_each_other_and_are_escaped_and_cut():
    page = explore.answers_beside(RECORDS[0], {"base": "x" * 900, "adapted": "a\nb", "none": " "}).data
    assert "&lt;b&gt;line" in page and "yes, but" in page and "a<br>b" in page and "<i>nothing</i>" in page
    assert "x" * 600 + " …" in page and "x" * 601 not in page


def test_the_explorer_draws_the_probabilities_that_the_loss_is_made_of(small_llama, tokenizer):
    torch.manual_seed(0)
    model = add_lora(small_llama, LoRAConfig(r=2))
    explorer = explorers.Explorer(
        explore, lambda: explore.record_explorer(model, tokenizer, RECORDS), interactive=True
    )
    assert set(explorer.controls) == {"record", "strength"} and explorer.controls["record"].max == 1
    for i, record in enumerate(RECORDS):
        (axes,) = explorer.figure(record=i).axes
        before, after = axes.lines
        assert list(before.get_ydata()) == list(after.get_ydata())  # B = 0: the adapter changes nothing yet
        loss, tokens = held_out_loss(model, tokenizer, [record])
        assert len(after.get_ydata()) == tokens == encode(record, tokenizer).n_supervised
        assert -sum(map(math.log, after.get_ydata())) / tokens == pytest.approx(loss, rel=1e-3)
    assert "line" in explorers.title(explorer.figure(record=0))


def test_an_explorer_of_nothing_is_refused(small_llama, tokenizer):
    with pytest.raises(ValueError, match="no records"):
        explore.record_explorer(small_llama, tokenizer, [])


def test_results_are_drawn_where_they_are_with_their_intervals():
    axes = result_rows({"base": (0.1, (0.0, 0.3)), "adapted": (0.6, (0.4, 0.8))}, "t", "share", is_share=True)
    band, dot = axes.lines[2:4]
    assert list(band.get_xdata()) == [0.4, 0.8] and list(dot.get_xdata()) == [0.6]
    assert [text.get_text() for text in axes.texts] == ["10%", "60%"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["base", "adapted"]
    losses = result_rows({"base": (3.5, (3.0, 4.0))}, "t", "loss", is_share=False)
    assert losses.get_xlim()[1] > 4 and losses.texts[0].get_text() == "3.50"


def test_a_dollar_in_a_token_is_no_formula():
    axes = written_answer(["$", "2 $"], [0.1, 0.2], [0.5, 0.6], "t")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [r"\$", r"2 \$"]
    axes.figure.canvas.draw()
