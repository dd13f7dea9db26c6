"""Expressions from a file mean what they mean in `re`, and none of them can hang."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.models import patterns
from labkit.models.patterns import PatternError, check_patterns, matches_whole

ATOMS = (
    "a",
    "b",
    ".",
    "[ab]",
    "[^a]",
    r"\w",
    r"\.",
    "a?",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    "(?<!b)",
    "^",
    "$",
    r"\b",
    "",
)
counts = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted)
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        inner.map("({})*".format),
        inner.map("({})+?".format),
        st.tuples(inner, counts).map(lambda both: f"({both[0]}){{{both[1][0]},{both[1][1]}}}"),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.text("ab.", max_size=6))
def test_an_expression_means_what_it_means_in_re(pattern, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "MAX_WAYS", -1)  # never left to `re`
        patterns.few_ways.cache_clear()
        expected = re.compile(pattern).fullmatch(text) is not None
        assert matches_whole(pattern, text) == expected
    patterns.few_ways.cache_clear()


NAME = "model.language_model.layers.10.mlp.experts.127.shared_expert.gate_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*\.(q|gate)_proj", True),
        (r"^(?!.*vision).*(?:q_proj|gate_proj)$", True),
        (r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)", True),
        ("(?i)MODEL.*GATE_PROJ", True),
        (r"((\w|\.)*)*!", False),
        ("(a|a)*b", False),
        (r"(.*)*(.*)*(.*)*!", False),
        ("(" * 60 + ".?" + "){2}" * 60, None),
        ("(?=.*" * 15 + "z" + ")" * 15, False),
        ("(.{0,1000}){0,1000}z", False),
        (".*" * 2000 + "!", False),
    ],
)  # fmt: skip
def test_no_expression_hangs(pattern, expected):
    """What `re` does not finish in the lifetime of the universe; a pattern that hangs is a test that never ends."""
    if expected is None:
        with pytest.raises(PatternError, match="more than 16 looks ahead or behind and repeats of repeats"):
            matches_whole(pattern, NAME)
    else:
        assert matches_whole(pattern, NAME) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"'\(' is not a regular expression \(missing \)"),
        (r"(a)\1", "an expression with groupref, which is not matched here"),
        ("(?i:a).*.*", "flags in a group"),
        ("a++", "possessive repeat"),
        ("(?>a)", "atomic group"),
        ("a" * 5000, "5,000 characters; at most 4,096"),
        ("(" * 1000 + ")" * 1000, "is not a regular expression"),
        ("a{99999999999999}", "is not a regular expression"),
    ],
)
def test_what_cannot_be_matched_is_named(pattern, message):
    with pytest.raises(PatternError, match=message):
        matches_whole(pattern, "a")


def test_many_patterns_have_a_bound_together():
    check_patterns([f"layers.{i}.self_attn.q_proj" for i in range(1000)])
    with pytest.raises(PatternError, match="more than 65,536 characters together"):
        check_patterns([f"layers.{i}.self_attn.q_proj" for i in range(5000)])
    with pytest.raises(PatternError, match="more than 4,096 with several stars"):
        check_patterns([f".*{i}.*.*" for i in range(1000)])
