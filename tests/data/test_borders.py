"""Between a prompt and its answer stands something, so that a tokenizer cannot merge them."""

import pytest

from labkit.data.borders import with_borders
from labkit.data.encoding import encode


def test_an_answer_no_longer_runs_on_from_its_prompt(tiny):
    tokenizer = tiny[1]
    record = {"prompt": "Translate: hello", "completion": "bonjour"}
    (made,) = with_borders([record])
    one = encode(made, tokenizer)
    assert tokenizer.decode(one.prompt).endswith("hello\n")
    assert tokenizer.decode(one.completion, skip_special_tokens=True) == "bonjour"
    assert record["prompt"] == "Translate: hello"  # the file's own record is as it was


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a\n", "completion": "b"},
        {"prompt": "a:", "completion": " b"},
        {"prompt": "", "completion": "a whole text"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
    ids=["break", "space", "text", "chat"],
)
def test_what_has_a_border_or_needs_none_stays_as_it_is(record):
    assert with_borders([record]) == [record]
