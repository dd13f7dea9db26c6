"""Which metric fits which answers, and what it says of a model."""

import json
import math

import pytest

from labkit.data.encoding import encode
from labkit.training import judging
from labkit.training.evaluate import held_out_loss
from labkit.training.intervals import wilson
from labkit.training.judging import Measurement, Metric, choose_metric, judged, measure


def answers(*completions):
    return [{"prompt": f"question {i}\n", "completion": text} for i, text in enumerate(completions)]


def test_json_with_the_same_keys_is_judged_by_fields():
    metric = choose_metric(answers('{"a": 1, "b": null}', '{"b": 2, "a": 3}'))
    assert metric.name == "fields" and set(metric.fields) == {"a", "b"} and "a, b" in metric.why


@pytest.mark.parametrize(
    "other", ['{"a": 1}', "[1, 2]", "{", "a word"], ids=["keys", "list", "broken", "text"]
)
def test_one_answer_of_another_kind_makes_it_no_json(other):
    assert choose_metric(answers('{"a": 1, "b": 2}', other, '{"a": 5, "b": 6}')).name == "loss"


def test_labels_are_judged_word_for_word():
    metric = choose_metric(answers("loans", "events", "loans", "events", "building"))
    assert metric.name == "exact" and "3 different" in metric.why


def test_different_texts_are_judged_by_loss():
    assert choose_metric(answers("a plank is gone", "take care", "closed", "closed")).name == "exact"
    assert choose_metric(answers("a plank is gone", "take care", "closed", "open")).name == "loss"


def test_texts_without_a_question_are_judged_by_loss():
    same = [{"prompt": "", "completion": "the same text"}] * 4
    assert choose_metric(same).name == "loss"


def test_chats_are_judged_by_their_last_answer():
    chats = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "yes"}]}
        for i in range(3)
    ]
    assert choose_metric(chats).name == "exact"


def test_no_records_fit_no_metric():
    with pytest.raises(ValueError, match="no records"):
        choose_metric([])
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        Metric("exakt", "")


GOLD = [
    {"prompt": "x\n", "completion": json.dumps(one)} for one in ({"a": "1", "b": None}, {"a": "1", "b": True})
]
FIELDS = Metric("fields", "", ("a", "b"))


@pytest.mark.parametrize(
    "given, right, a, b",
    [
        (['{"a":"1","b":null}', '{"b":true, "a":"1"}'], [True, True], 1, 1),  # space and order are no matter
        (['{"a":"1"}', '{"a":"1","b":1}'], [False, False], 1, 0),  # no key is not null, and 1 is not true
        (
            ['{"a":"1","b":null,"c":2}', '{"a":1,"b":true}'],
            [False, False],
            0.5,
            1,
        ),  # a key too many; 1 is not "1"
        (['{"a":"1","b":null', "sure: {}"], [False, False], 0, 0),  # not JSON
    ],
    ids=["right", "keys", "types", "broken"],
)
def test_json_is_right_if_all_its_fields_are(given, right, a, b):
    assert judged(given, GOLD, FIELDS) == (right, {"a": a, "b": b})


def test_a_label_is_right_word_for_word_but_for_space_around_it():
    gold = answers("loans", "loans", "loans")
    assert judged([" loans\n", "Loans", "loans."], gold, Metric("exact", ""))[0] == [True, False, False]
    with pytest.raises(ValueError, match="2 answers for 3 records"):
        judged(["a", "b"], gold, Metric("exact", ""))


def test_the_loss_of_a_measurement_is_the_held_out_loss(tiny):
    records = answers("one two three", "four")
    found = measure(*tiny, records, Metric("loss", ""))
    assert found.loss == pytest.approx(held_out_loss(*tiny, records)[0], rel=1e-5)
    assert found.tokens == [encode(record, tiny[1]).n_supervised for record in records]
    assert found.answers == found.right == [] and found.share is None and found.share_interval is None
    low, high = found.loss_interval
    assert low < found.loss < high


def test_a_model_is_asked_without_the_answers_and_judged_by_them(tiny, monkeypatch):
    asked = []

    def write(model, tokenizer, prompts, max_new_tokens, *others):
        asked.append((prompts, max_new_tokens))
        return ["loans", "event"]

    monkeypatch.setattr(judging, "generate", write)
    found = measure(*tiny, answers("loans", "events"), Metric("exact", ""))
    ((prompts, room),) = asked
    assert prompts == ["question 0\n", "question 1\n"]
    longest = max(len(encode(record, tiny[1]).completion) for record in answers("loans", "events"))
    assert longest < room <= 2 * longest
    assert found.right == [True, False] and found.share == 0.5 and found.share_interval == wilson(1, 2)


def test_a_record_that_is_too_long_is_no_silent_gap(tiny):
    with pytest.raises(ValueError, match=r"records \[1\] are longer than max_length=20"):
        measure(*tiny, answers("a", "word " * 40), Metric("loss", ""), max_length=20)


def test_a_measurement_reads_as_a_sentence():
    found = Measurement([2.0, 4.0], [2, 4], ["a", "b"], [True, False], {"unit": 0.5})
    assert str(found).startswith("1 of 2 right = 50% (9% to 91%), loss 1.00 (1.00 to 1.00), unit 50%")
    assert not math.isnan(found.loss)
