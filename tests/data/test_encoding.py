"""From a record to token ids."""

import pytest
import torch

from labkit.data.encoding import Encoded, encode, encode_all
from tests.data.tokenizers import FAMILIES, tiny_llama


def test_a_prompt_and_its_completion_tokenize_the_same_apart_and_together(tokenizer, records):
    for record in records:
        one = encode(record, tokenizer)
        whole = tokenizer.apply_chat_template(record["messages"], tokenize=False).rstrip()
        assert one.prompt + one.completion == tokenizer(whole)["input_ids"]
        assert one.completion[-1] == tokenizer.eos_token_id
        assert torch.tensor(one.completion).ne(tokenizer.eos_token_id).sum() == len(one.completion) - 1


def test_a_record_of_which_nothing_would_be_learned_is_named_with_its_index_and_the_reason():
    good, tokenizer = {"prompt": "a", "completion": "b"}, tiny_llama()
    tokenizer.eos_token = None
    for record, reason in (
        (
            {"prompt": "", "completion": "!"},
            "its only token has nothing before it to predict it from; give a prompt",
        ),
        (
            {"prompt": "a", "completion": ""},
            "the completion is empty, and the tokenizer has no EOS token to end it",
        ),
        ({"prompt": "", "completion": ""}, "the completion is empty"),
    ):
        with pytest.raises(
            ValueError, match=f"^record 1: nothing of {{'prompt': .* would be learned: {reason}"
        ):
            encode_all([good, record], tokenizer, 99)
    assert encode_all([good], tokenizer, 99)[0][0].end == 0


def test_a_first_token_without_a_bos_token_before_it_is_context():
    """There is nothing to predict it from; the end mark alone would be learned of a completion of one token."""
    with pytest.raises(ValueError, match="its only token has nothing before it"):
        encode({"prompt": "", "completion": "!"}, tiny_llama())
    one = encode({"prompt": "", "completion": "a b c"}, tiny_llama())
    assert one.n_supervised == len(one.completion) - 1 > one.end
    with_bos = encode({"prompt": "", "completion": "yes"}, FAMILIES["llama2"]())
    assert with_bos.n_supervised == len(with_bos.completion)


def test_an_empty_answer_is_its_end_mark():
    tokenizer = tiny_llama()
    assert encode({"prompt": "a", "completion": ""}, tokenizer).completion == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "'text' is a str, and must be a dict"),
        ({"prompt": "a"}, r"\['completion'\] is missing or not a text. It has: \['prompt'\]"),
        ({"prompt": 1, "completion": None}, r"\['prompt', 'completion'\] is missing or not a text"),
        ({"text": "a"}, r"It has: \['text'\]"),
        ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}, "make {'messages': prompt"),
    ],
)
def test_what_is_no_record_is_refused_with_what_one_is(record, message):
    with pytest.raises(ValueError, match=message):
        encode(record, tiny_llama())


def test_records_that_are_too_long_are_left_out_and_counted_and_none_that_fits_is_an_error():
    tokenizer, short, long = (
        tiny_llama(),
        {"prompt": "a", "completion": "b"},
        {"prompt": "a " * 50, "completion": "b"},
    )
    examples, left_out = encode_all([long, short, long], tokenizer, 20)
    assert len(examples) == 1 and left_out == [0, 2]
    with pytest.raises(
        ValueError, match="all 2 records are longer than max_length=20 tokens; raise max_length"
    ):
        encode_all([long, long], tokenizer, 20)
    with pytest.raises(ValueError, match="the data set is empty"):
        encode_all([], tokenizer, 20)


def test_without_its_end_an_example_is_the_same_up_to_the_mark():
    assert Encoded([1], [2, 3, 4], 2).without_end() == Encoded([1], [2])
    assert Encoded([1], [2]).without_end() == Encoded([1], [2])
