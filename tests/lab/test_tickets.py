"""The furniture of `08_qlora_finetune`: checks that name mistakes, and the explorer of its tickets."""

import pytest
import torch
from IPython.display import HTML

from labkit.data.encoding import encode
from labkit.data.tickets import load_tickets
from labkit.lab.check import tickets as check
from labkit.lab.explore import tickets as explore
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.training.evaluate import held_out_loss
from tests.lab import exercise_checks, explorers

CASES = [
    (
        check.lora_parameters,
        lambda shapes, r: sum(r * (a + b) for a, b in shapes),
        [
            (lambda shapes, r: sum(2 * r * (a + b) for a, b in shapes), "twice the number"),
            (lambda shapes, r: sum(a * b for a, b in shapes), "which LoRA freezes"),
        ],
    ),
    (
        check.supervise,
        lambda p, c: [-100] * len(p) + c,
        [
            (lambda p, c: p + c, "prompt is supervised too"),
            (lambda p, c: c, "prompt is missing"),
            (lambda p, c: [-100] * (len(p) - 1) + c + [-100], "already shifted by one"),
        ],
    ),
    (
        check.bits_per_weight,
        lambda b, n: 4 + 8 / b + 32 / (b * n),
        [
            (lambda b, n: 4 + 32 / b, "without double quantization"),
            (lambda b, n: 4 + 8 / b, "scales of the scales are missing"),
        ],
    ),
]

(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(CASES, times=100)


def test_token_probabilities_multiply_to_the_loss(small_llama, tokenizer, records):
    chances = explore.token_probabilities(small_llama, encode(records[0], tokenizer))
    loss, tokens = held_out_loss(small_llama, tokenizer, records[:1])
    assert len(chances) == tokens and -chances.log().mean().item() == pytest.approx(loss, rel=1e-4)


def test_answer_table_marks_wrong_fields_and_escapes_html():
    page = explore.answer_table(
        "<b>hi</b>", {"base": "no json", "adapted": '{"a": "x", "b": 1}'}, {"a": "x", "b": 2}
    ).data
    assert "&lt;b&gt;hi" in page and "no JSON" in page
    assert page.count("underline wavy") == 1


def test_the_explorer_shows_a_table_and_the_probabilities_of_the_gold_answer(small_llama, tokenizer):
    torch.manual_seed(0)
    model = add_lora(small_llama, LoRAConfig(r=2))
    tickets = load_tickets("test")[:2]
    given = model, tokenizer, tickets, ["no json", "no json"], ["nor here", "nor here"]
    table, figure = explorers.shown(explore, lambda: explore.ticket_explorer(*given))
    assert isinstance(table, HTML) and tickets[0]["message"][:20] in table.data
    before, after = figure.axes[0].lines  # B = 0: the adapter changes nothing yet
    assert list(before.get_ydata()) == list(after.get_ydata())
    explorer = explorers.Explorer(explore, lambda: explore.ticket_explorer(*given), interactive=True)
    assert set(explorer.controls) == {"ticket", "strength"} and explorer.controls["ticket"].max == 1


def test_explorer_needs_an_answer_for_each_ticket(small_llama, tokenizer):
    with pytest.raises(ValueError, match="1 tickets with 0 and 1 answers"):
        explore.ticket_explorer(small_llama, tokenizer, [{}], [], ["x"])
