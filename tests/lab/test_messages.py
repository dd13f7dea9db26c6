"""The box for messages: what it says of each token and each field, of any answer, and of messages it cannot take."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.display import HTML

from labkit import models
from labkit.data.encoding import Encoded
from labkit.data.tickets import TICKET_CLASSES, load_tickets
from labkit.lab.explore import answers, background, messages
from labkit.lab.explore.answers import pieces_of, read_answer, value_spans
from labkit.lab.explore.tickets import token_probabilities
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.merging import adapter_strength
from labkit.training.config import TrainConfig
from labkit.training.evaluate import generate
from labkit.training.greedy import Stops
from labkit.training.loop import train
from tests.lab import explorers
from tests.training.small_runs import QUIET, SHORT, tiny_adapted, weights

KINDS = {"fault": "The {} is broken", "delivery": "The {} has not come"}
CLASSES = {"kind": (*KINDS, "question")}


@pytest.fixture(scope="module")
def learned(tiny):
    """tiny-llama that has learned to answer such messages with JSON, and its tokenizer; read only."""
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=16))
    data = [
        {
            "prompt": said.format(thing) + "\n",
            "completion": written({"thing": thing, "kind": kind, "order": None}),
        }
        for thing in ("lamp", "house", "boat")
        for kind, said in KINDS.items()
    ]
    train(model, tokenizer, data, TrainConfig(**QUIET | {"steps": 30, "batch_size": 6, "lr": 5e-3}))
    return model, tokenizer


def written(value):
    return json.dumps(value, separators=(",", ":"))


def box_of(learned, tickets=(), **more):
    settings = {"max_new_tokens": 40, "max_length": 120} | more
    return messages.MessageBox(*learned, tickets, CLASSES, lambda text: {"prompt": text + "\n"}, **settings)


def test_the_answer_is_the_one_that_generate_gives(learned):
    for prompt in ("The lamp is broken\n", "And it came to pass"):
        answer = read_answer(*learned, prompt, max_new_tokens=20)
        assert answer.text == generate(*learned, [prompt], 20, progress=False)[0]
        assert len(answer.pieces) == len(answer.probabilities) <= 20
        assert "".join(answer.pieces).replace("<|endoftext|>", "").strip() == answer.text


def test_fields_have_the_values_of_the_json_and_the_end_is_a_token(learned):
    answer = read_answer(*learned, "The lamp is broken\n", CLASSES)
    assert {name: one.value for name, one in answer.fields.items()} == json.loads(answer.text)
    assert set(answer.fields) == {"thing", "kind", "order"} and answer.pieces[-1] == "<|endoftext|>"


def test_the_probability_of_a_value_is_the_product_of_its_tokens(learned):
    """By another way: the offsets that the tokenizer gives, and one forward pass."""
    model, tokenizer = learned
    prompt = "The lamp has not come\n"
    answer = read_answer(model, tokenizer, prompt, CLASSES)
    for name, one in answer.fields.items():
        assert one.probability == pytest.approx(
            by_offsets(model, tokenizer, prompt, answer.text, name), rel=1e-3
        )


def by_offsets(model, tokenizer, prompt, text, name):
    """P of the value of field `name`, from its colon to the sign behind it."""
    start = text.index(f'"{name}"') + len(name) + 2
    end = text.index(written(json.loads(text)[name]), start) + len(written(json.loads(text)[name])) + 1
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    example = Encoded(tokenizer(prompt, add_special_tokens=False)["input_ids"], coded["input_ids"])
    chances = token_probabilities(model, example)
    inside = [b > start and a < end for a, b in coded["offset_mapping"]]
    return math.prod(p for p, one in zip(chances.tolist(), inside) if one)


def test_each_allowed_value_is_measured_in_place(learned):
    model, tokenizer = learned
    prompt = "The lamp has not come\n"
    answer = read_answer(model, tokenizer, prompt, CLASSES)
    kind = answer.fields["kind"]
    assert next(iter(kind.choices)) == kind.value == "delivery" and set(kind.choices) == set(CLASSES["kind"])
    assert sum(kind.choices.values()) <= 1 + 1e-6
    assert kind.choices["delivery"] == pytest.approx(kind.probability, rel=1e-4)
    for value, chance in kind.choices.items():
        other = written({**json.loads(answer.text), "kind": value})
        assert chance == pytest.approx(by_offsets(model, tokenizer, prompt, other, "kind"), rel=1e-3)
    assert answer.fields["thing"].choices == {}


def test_an_answer_that_is_no_json_object_has_tokens_and_no_fields(learned):
    with adapter_strength(learned[0], 0):
        answer = read_answer(*learned, "The lamp is broken\n", CLASSES, max_new_tokens=8)
    assert answer.fields is None and len(answer.pieces) == 8
    page = messages.fields_table({"base": answer}, None)
    assert "No answer is a JSON object" in page


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.sampled_from([None, 0, 2]), st.booleans())
def test_the_span_of_a_value_is_its_json(value, indent, ascii_only):
    text = " " + json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    spans = value_spans(text)
    assert set(spans) == set(value)
    for name, span in spans.items():
        assert json.loads(text[span.start : span.end]) == value[name]
        assert text[span.colon] == ":" and text[span.colon + 1 : span.start].strip() == ""


@pytest.mark.parametrize("text", ["naïve 🙂 \ufffd. Ġorġ", "", " a\n b"])
def test_pieces_make_the_text_even_where_a_letter_takes_several_tokens(tiny, text):
    ids = tiny[1](text, add_special_tokens=False)["input_ids"]
    pieces, whole = pieces_of(ids, Stops(frozenset(), ""), tiny[1])
    assert "".join(pieces) == whole == text and len(pieces) == len(ids)


def test_the_page_has_both_answers_and_the_gold_one_and_marks_what_is_wrong(learned):
    ticket = {"message": "The lamp is broken", "label": {"thing": "lamp", "kind": "delivery", "order": None}}
    shown = []
    parts = box_of(learned, [ticket]).answer(ticket["message"], lambda parts: shown.append(list(parts)))
    page = parts["fields"]
    assert page.count("underline wavy") == 1 and ">gold<" in page and "&quot;delivery&quot;" in page
    assert "the answer is not a JSON object" in page and "question" in page
    assert shown == [["message", "fields", "adapted"], ["message", "fields", "adapted", "base"]]
    unknown = box_of(learned, [ticket]).answer("The boat is broken")
    assert ">gold<" not in unknown["fields"] and "underline" not in unknown["fields"]


def test_what_a_user_types_is_text_and_never_html(learned):
    parts = box_of(learned).answer("<script>alert(1)</script> <img src=x onerror=alert(1)>")
    page = "".join(parts.values())
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;alert(1)" in page
    reading = answers.FieldReading("<x-value>", 0.5, {"<x-choice>": 0.5})
    answer = answers.Answer("", ["<x-token>", "\n"], [0.5, 1.0], {"<x-field>": reading})
    table = messages.fields_table({"<x-who>": answer}, {"<x-field>": "<x-gold>"})
    page = messages.tokens_line("<x-who>", answer) + table
    assert "<x-" not in page and page.count("&lt;x-") == 7


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("", "there is no message yet; type one"),
        (" \n", "there is no message yet"),
        (
            "lamp " * 100,
            r"too long: \d+ tokens with its instruction, and at most 80 leave room for an answer of 40",
        ),
    ],
)
def test_a_message_that_cannot_be_answered_is_told(learned, message, told):
    with pytest.raises(ValueError, match=told):
        box_of(learned).answer(message)


def test_the_context_of_the_model_is_a_limit_too(learned):
    with pytest.raises(ValueError, match="at most 472 leave room"):  # tiny-llama has 512 positions
        box_of(learned, max_length=10_000).answer("lamp " * 500)


def test_headless_two_messages_are_answered(learned):
    given = {"classes": CLASSES, "to_record": lambda text: {"prompt": text + "\n"}, "max_new_tokens": 12}
    pages = explorers.shown(messages, lambda: messages.message_box(*learned, **given))
    assert len(pages) == 2 and all(isinstance(page, HTML) for page in pages)
    tickets = [
        {"message": f"The {thing} is broken", "label": {"kind": "fault"}} for thing in ("lamp", "boat", "sea")
    ]
    pages = explorers.shown(messages, lambda: messages.message_box(*learned, tickets, **given))
    assert [("The lamp" in page.data, "The boat" in page.data) for page in pages] == [
        (True, False),
        (False, True),
    ]


def test_the_button_answers_and_tells_what_went_wrong(learned, monkeypatch):
    ticket = {"message": "The boat is broken", "label": {"kind": "fault"}}
    box, displayed = box_of(learned, [ticket]), []
    monkeypatch.setattr(messages, "display", displayed.append)
    box.show()
    chosen, text, (button, status), page = [
        *displayed[0].children[:2],
        displayed[0].children[2].children,
        displayed[0].children[3],
    ]
    button.click()
    assert "there is no message yet" in status.value and page.value == ""
    chosen.value = ticket["message"]
    assert text.value == ticket["message"]
    button.click()
    assert status.value == "" and "&quot;fault&quot;" in page.value and not button.disabled
    monkeypatch.setattr(box, "answer", lambda *_: 1 / 0)
    button.click()
    assert "ZeroDivisionError" in status.value and page.value == "" and not button.disabled


def test_a_run_in_the_background_stands_while_its_model_answers(tiny):
    """And goes on to the very weights that it would have reached."""
    config = TrainConfig(**QUIET | {"steps": 60})
    plain = tiny_adapted()
    train(plain, tiny[1], SHORT, config)
    run = background.BackgroundRun(tiny_adapted(), tiny[1], SHORT, config, None)
    run.start()
    box = box_of((run.model, tiny[1]), max_new_tokens=4)
    while run.is_on:
        box.answer("The lamp is broken")
    run.stop()
    assert run.error is None and torch.equal(weights(run.model), weights(plain))


def test_the_classes_of_the_tickets_are_those_of_the_data():
    labels = [ticket["label"] for split in ("train", "validation", "test") for ticket in load_tickets(split)]
    for name, values in TICKET_CLASSES.items():
        assert {label[name] for label in labels} == set(values)
