"""Facts to remember: one token per digit, distinct names, uniform digits."""

import re

import pytest

from labkit.data.encoding import encode
from labkit.data.facts import make_facts


@pytest.mark.parametrize("digits", [1, 4, 7])
def test_a_fact_is_one_token_a_digit_and_nothing_merges_at_the_boundary(tiny, digits):
    _, tokenizer = tiny
    for fact in make_facts(300, seed=3, digits=digits):
        assert re.fullmatch(r"<\|endoftext\|>The number of [A-Z][a-z]{5} is ", fact["prompt"])
        one = encode(fact, tokenizer)
        assert one.prompt[0] == 0 and 0 not in one.prompt[1:]
        assert [tokenizer.decode([i]) for i in one.completion] == [*fact["completion"], "<|endoftext|>"]
        assert len(fact["completion"]) == digits
        whole = tokenizer(fact["prompt"] + fact["completion"], add_special_tokens=False)["input_ids"]
        assert whole == one.prompt + one.completion[:-1]


def test_facts_are_a_prefix_of_more_facts_distinct_and_the_same_for_a_seed():
    many = make_facts(5000, seed=1)
    assert make_facts(700, seed=1) == many[:700] and make_facts(5000, seed=1) == many
    assert len({fact["prompt"] for fact in many}) == 5000
    other = make_facts(700, seed=2)
    assert sum(a == b for a, b in zip(other, many)) < 3
    longer = make_facts(700, seed=1, digits=6)
    assert [fact["prompt"] for fact in longer] == [fact["prompt"] for fact in many[:700]]


def test_digits_of_facts_are_uniform_in_every_place():
    answers = [fact["completion"] for fact in make_facts(20_000, seed=0)]
    for place in range(4):
        counts = [sum(answer[place] == digit for answer in answers) for digit in "0123456789"]
        chi2 = sum((count - 2000) ** 2 / 2000 for count in counts)
        assert chi2 < 27.9  # the 99.9th percentile with 9 degrees of freedom


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_facts(0), "n=0 must be a whole number from 1 to 250,000"),
        (lambda: make_facts(5, digits=0), "digits=0 must be a whole number of at least 1"),
        (lambda: make_facts(300_000), "n=300000 must be a whole number from 1 to 250,000"),
        (lambda: make_facts(2.0), "n=2.0 must be a whole number"),
    ],
)
def test_errors_name_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
