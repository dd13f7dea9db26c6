"""Prompts are posed as chats where the model has a template, and never run into their answers."""

import pytest

from labkit.data.chats import split_chat
from labkit.data.encoding import encode
from labkit.data.posing import posed

PAIR = {"prompt": "Translate: hello", "completion": "bonjour"}


def test_a_chat_model_is_asked_in_its_template(tokenizer):
    (made,) = posed([PAIR], tokenizer, "To French.")
    prompt, answer, _ = split_chat(made, tokenizer)
    assert prompt.index("To French.") < prompt.index("Translate: hello") and answer == "bonjour"
    assert [m["role"] for m in posed([PAIR], tokenizer)[0]["messages"]] == ["user", "assistant"]


def test_a_plain_answer_no_longer_runs_on_from_its_prompt(tiny):
    tokenizer = tiny[1]
    (made,) = posed([PAIR], tokenizer)
    one = encode(made, tokenizer)
    assert tokenizer.decode(one.prompt).endswith("hello\n")
    assert tokenizer.decode(one.completion, skip_special_tokens=True) == "bonjour"
    assert posed([PAIR], tokenizer, "To French:")[0]["prompt"] == "To French:\nTranslate: hello\n"
    assert PAIR["prompt"] == "Translate: hello"  # the file's own record is as it was


@pytest.mark.parametrize(
    "record", [{"prompt": "a\n", "completion": "b"}, {"prompt": "a:", "completion": " b"}]
)
def test_white_space_is_border_enough(tiny, record):
    assert posed([record], tiny[1]) == [record]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "", "completion": "a whole text"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
    ids=["text", "chat"],
)
def test_texts_and_chats_stay_as_they_are(tokenizer, tiny, record):
    assert posed([record], tokenizer, "Answer.") == posed([record], tiny[1], "Answer.") == [record]
