"""Text to ids: what a tokenizer of transformers makes of the joined text, cut where the prompt ends when served."""

import pytest
from tokenizers import normalizers

from labkit.data.encoding import encode
from labkit.data.tokens import ChatPrompt, completion_ids, prompt_ids, text_of, tokens_around
from tests.data.tokenizers import FAMILIES, Slow, byte_level, llama2_without_bytes, tiny_llama, word_piece

BORDERS = [  # a token of the joined text begins there, in every family
    ("Answer:\n", "yes"),
    ("name FROM", " users"),
    ("The number of rows is", " 12."),
    ("a b", " c\n"),
]
WITHIN = [
    ("play", "ing"),
    ("Answer: ", "yes"),
    ("Answer: y", "es"),
    ("The number of r", "ows"),
    ("a  ", "b c"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


@pytest.mark.parametrize(("prompt", "completion"), BORDERS)
def test_ids_are_those_of_the_joined_text_with_the_tokens_that_the_tokenizer_puts_around_it(
    family, prompt, completion
):
    one = encode({"prompt": prompt, "completion": completion}, family)
    joined = list(family(prompt + completion)["input_ids"])
    end = family.sep_token_id if family.eos_token_id is None else family.eos_token_id
    assert one.prompt + one.completion == (joined if joined[-1] == end else [*joined, end])
    assert one.end == 1 and one.without_end().completion == one.completion[:-1]


@pytest.mark.parametrize(("prompt", "completion"), BORDERS + WITHIN)
def test_the_prompt_is_what_the_tokenizer_makes_of_it_alone_and_the_text_is_the_joined_one(
    family, prompt, completion
):
    one = encode({"prompt": prompt, "completion": completion}, family)
    before, after = tokens_around(family)
    alone = list(family(prompt)["input_ids"])
    assert one.prompt == alone[: len(alone) - len(after)] and one.prompt[: len(before)] == before
    written = text_of(one.prompt + one.without_end().completion, family)
    assert written == text_of(
        before + family(prompt + completion, add_special_tokens=False)["input_ids"], family
    )


@pytest.mark.parametrize(("prompt", "completion"), BORDERS + WITHIN)
def test_a_tokenizer_without_offsets_gives_the_same_ids(family, prompt, completion):
    record = {"prompt": prompt, "completion": completion}
    assert encode(record, Slow(family)) == encode(record, family)


def test_the_space_before_every_text_of_llama_2_is_not_put_into_the_middle():
    """The prompt keeps the tokens that it has when the model serves, with its BOS token."""
    tokenizer = llama2_without_bytes()
    one = encode({"prompt": "Answer:", "completion": " yes"}, tokenizer)
    assert one.prompt == tokenizer("Answer:")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(one.completion) == ["▁", "yes", "</s>"]
    assert tokenizer.decode(one.prompt + one.completion) == "<s> Answer: yes</s>"


def test_a_token_across_the_border_is_cut_and_not_learned_behind_a_prompt_that_is_never_served():
    tokenizer = tiny_llama()
    cut = encode({"prompt": "Package: ", "completion": "A"}, tokenizer)
    whole = encode({"prompt": "Package:", "completion": " A"}, tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(one.prompt + one.completion)[-4:] for one in (cut, whole)]
    assert pieces == [[":", "Ġ", "A", "<|endoftext|>"], ["age", ":", "ĠA", "<|endoftext|>"]]
    assert cut.prompt == tokenizer("Package: ")["input_ids"]


def test_a_word_that_goes_on_over_the_border_is_marked_as_going_on():
    tokenizer = word_piece()
    one = encode({"prompt": "play", "completion": "ing"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(one.prompt + one.completion) == ["[CLS]", "play", "##ing", "[SEP]"]


def test_bos_and_eos_in_the_text_are_not_doubled(family):
    if family.bos_token is None:
        pytest.skip("has no BOS token")
    before, _ = tokens_around(family)
    ids = prompt_ids(family.bos_token + "a", family)
    assert ids.count(family.bos_token_id) == 1 and (ids == prompt_ids("a", family) or not before)
    plain, marked = (
        encode({"prompt": "a\n", "completion": f"b{end}"}, family) for end in ("", family.eos_token)
    )
    assert plain == marked


def test_a_prompt_that_a_template_wrote_gets_no_bos_token():
    tokenizer = FAMILIES["llama2"]()
    assert prompt_ids("a", tokenizer) == [1, *prompt_ids(ChatPrompt("a"), tokenizer)]


def test_what_the_tokenizer_has_no_token_for_is_not_learned_as_unknown():
    tokenizer, as_context = llama2_without_bytes(), {"prompt": "Answer: ☃", "completion": "yes"}
    with pytest.raises(
        ValueError, match=r"no token for '☃' in the completion 'yes ☃', so '<unk>' would be learned"
    ):
        completion_ids("Answer:", "yes ☃", tokenizer)
    assert tokenizer.decode(encode(as_context, tokenizer).completion) == "yes</s>"
    with pytest.raises(ValueError, match=r"makes nothing of the completion '\\u200b'; leave the record out"):
        completion_ids("a", "\u200b", word_piece())


def test_a_border_that_the_tokenizer_cannot_write_is_refused():
    """An accent of its own becomes one letter with what it stands on, under NFC as Qwen's tokenizer has it."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(
        ValueError, match="joins the end of the prompt .* let the completion begin where a word does"
    ):
        completion_ids("cafe", "\u0301 yes", tokenizer)
    assert completion_ids("caf", "e\u0301 yes", tokenizer) == tokenizer("é yes")["input_ids"]


def test_a_template_or_tokenizer_that_cuts_off_does_not_cut_off_here():
    """A tokenizer.json may come with truncation and padding switched on."""
    tokenizer, text = byte_level(), "name FROM users " * 20
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    one = encode({"prompt": text, "completion": text}, tokenizer)
    assert tokenizer.decode(one.prompt + one.completion) == text + text + "<|endoftext|>"
