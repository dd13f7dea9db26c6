"""Baselines: the commonest answer, the nearest record's, solved examples before a prompt, and n-grams."""

import math

import pytest

from labkit.data.encoding import Encoded, encode
from labkit.training.baselines import majority_answers, nearest_answers, ngram_losses, with_solved


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def chat(user, assistant, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [*first, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    }


TRAIN = [
    pair("the lift is broken", "building"),
    pair("the roof is wet", "building"),
    pair("renew the atlas", "loans"),
    pair("the choir is late", "events"),
]


def test_majority_is_the_commonest_answer_for_all():
    assert majority_answers(TRAIN, TRAIN[2:]) == ["building", "building"]


def test_nearest_is_by_rare_words_and_not_by_common_ones():
    asked = [pair("is the atlas here", "?"), pair("Is the CHOIR on?", "?")]
    assert nearest_answers(TRAIN, asked) == ["loans", "events"]  # "the … is" alone would be the lift


def test_nearest_reads_the_users_words_in_a_chat():
    train = [chat("atlas", "loans", "Answer."), chat("choir", "events", "Answer.")]
    assert nearest_answers(train, [chat("where does the choir sing", "?", "Answer.")]) == ["events"]


def test_a_held_out_record_without_words_gets_some_answer():
    assert nearest_answers(TRAIN, [pair("!?", "x")]) == ["building"]


def test_solved_records_stand_before_the_prompt_and_after_the_system_message():
    asked = with_solved(chat("c", "d", "S"), [chat("a", "b", "S")])["messages"]
    assert [(m["role"], m["content"]) for m in asked] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    assert with_solved(pair("c\n", "d"), [pair("a\n", "b")]) == pair("a\nb\n\nc\n", "d")


def test_ngram_losses_are_those_of_the_equation():
    train = [Encoded([9], [1, 2]), Encoded([9], [1, 3])]
    (loss,) = ngram_losses(train, [Encoded([9], [1, 2])], vocabulary=10)
    p1 = (2 + 3 / 10) / (4 + 3)  # of 1: twice among four tokens of three kinds
    p2 = (1 + 3 / 10) / (4 + 3)
    after_1 = (1 + 2 * p2) / (2 + 2)  # of 2 after 1: once of two, two kinds
    assert loss == pytest.approx(-math.log(p1) - math.log(after_1))


def test_ngram_probabilities_sum_to_one_and_an_unseen_token_has_some():
    train = [Encoded([9], [1, 2, 3, 1, 2]), Encoded([9], [3, 3])]
    for before in ([], [1], [1, 2], [7, 8]):
        held_out = [Encoded([9], [*before, token]) for token in range(10)]
        start = ngram_losses(train, [Encoded([9], before)], vocabulary=10)[0] if before else 0.0
        after = [math.exp(start - loss) for loss in ngram_losses(train, held_out, vocabulary=10)]
        assert sum(after) == pytest.approx(1) and min(after) > 0


def test_ngrams_count_what_training_counts(tiny):
    tokenizer = tiny[1]
    whole = encode({"prompt": "", "completion": "one two"}, tokenizer)
    behind = encode({"prompt": "x\n", "completion": "one two"}, tokenizer)
    for example in (whole, behind):
        (loss,) = ngram_losses([], [example], vocabulary=4096)
        assert loss == pytest.approx(example.n_supervised * math.log(4096))
