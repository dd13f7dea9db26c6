"""Random texts through every family of tokenizers, and small models that learn a few answers by heart and say them.

Whatever the tokenizer and the border between prompt and completion: what is trained reads as the joined text, its
prompt is what the tokenizer makes of the prompt alone, where a token begins at the border the ids are those of the
joined text, and a model that was trained to a loss near zero generates its answers and stops.
"""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.data.encoding import encode
from labkit.data.tokens import text_of, tokens_around
from labkit.training.config import TrainConfig
from labkit.training.evaluate import chat_prompts, generate
from labkit.training.loop import train
from tests.campaign.harness import rounds
from tests.conftest import make_small_llama
from tests.data.tokenizers import CHATS, FAMILIES, TEXTS, chat, llama2_without_bytes

ALL = FAMILIES | {"llama2_without_bytes": llama2_without_bytes}
TAKES_ANYTHING = ("llama2", "llama2_with_end", "byte_level", "byte_level_with_space", "tiny_llama")


def texts_of(name: str) -> st.SearchStrategy[str]:
    """Texts of words and letters that the tokenizer was made of; of one that takes anything, others too."""
    known = " ".join(TEXTS[:3] if name == "llama2_without_bytes" else TEXTS)
    words = st.lists(st.sampled_from(known.split(" ")), max_size=6).map(" ".join)
    pieces = st.lists(st.sampled_from([*known.split(" "), *known]), max_size=8).map("".join)
    code_points = st.integers(1, 0xD7FF) | st.integers(0xE000, 0x10FFFF)  # all but halves of pairs
    strange = st.lists(code_points.map(chr), max_size=12).map("".join)
    return st.one_of(words, pieces, strange) if name in TAKES_ANYTHING else st.one_of(words, pieces)


@pytest.mark.parametrize("name", ALL)
def test_random_texts_keep_their_text_their_served_prompt_and_the_ids_of_the_joined_text(name):
    tokenizer = ALL[name]()
    before, after = tokens_around(tokenizer)
    end = after or [tokenizer.eos_token_id]
    seen = {"whole": 0, "cut": 0, "refused": 0}

    @given(texts_of(name), st.floats(0, 1))
    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=rounds(60, 1500),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(text: str, border: float) -> None:
        prompt, completion = text[: round(border * len(text))], text[round(border * len(text)) :]
        joined = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        alone = tokenizer(prompt)["input_ids"]
        alone = alone[: len(alone) - len(after)]
        try:
            one = encode({"prompt": prompt, "completion": completion}, tokenizer)
        except ValueError as error:
            nothing_before = not alone and "nothing before it" in str(error)
            assert nothing_before or name not in TAKES_ANYTHING, error
            assert any(reason in str(error) for reason in ("nothing", "no token for", "joins the end")), error
            seen["refused"] += 1
            return
        assert one.prompt == alone
        learned = one.completion[: len(one.completion) - len(end)]
        assert one.completion[len(learned) :] == end
        inner = one.prompt[len(before) :]
        assert text_of(inner + learned, tokenizer) == text_of(joined["input_ids"], tokenizer)
        if joined["input_ids"][: len(inner)] == inner:
            assert inner + learned == joined["input_ids"]
            seen["whole"] += 1
        else:
            seen["cut"] += 1

    check()
    assert seen["whole"] > seen["refused"] and seen["cut"] > 0, seen


def learned_by_heart(tokenizer, records: list[dict]) -> torch.nn.Module:
    """A small model that was trained on the records until its loss is near zero."""
    model = make_small_llama(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        eos_token_id=5,
        bos_token_id=5,
        max_position_embeddings=128,
    )
    losses = train(
        model, tokenizer, records, TrainConfig(lr=5e-3, steps=60, batch_size=4, progress=False)
    ).losses
    assert losses[-1] < 0.1
    return model


BORDERS = {  # a prompt for each question, and the answers
    "word": ("Answer: {}", [" yes", " no", " name", " users"]),
    "space before": ("Answer: {} ", ["yes", "no", "name", "users"]),
    "in a word": ("Answer {} y", ["es", "ou", "n", "o"]),
    "line": ("{}\n", ["a b", "b", "c = 1", "rows"]),
}
CASES = [(name, border) for name in ALL for border in BORDERS]


@pytest.mark.parametrize(("name", "border"), CASES[:: rounds(9, 1)])
def test_a_model_that_knows_its_answers_by_heart_says_them_and_stops(name, border):
    tokenizer, (form, answers) = ALL[name](), BORDERS[border]
    if name == "llama2_without_bytes":  # its 40 tokens are of these letters
        form, answers = ("Answer:{}", [" yes", " no", " name", " users"])
    records = [{"prompt": form.format(q), "completion": a} for q, a in zip(("a", "s", "e", "r"), answers)]
    model = learned_by_heart(tokenizer, records)
    said = generate(model, tokenizer, [record["prompt"] for record in records], 12, progress=False)
    assert said == [answer.strip() for answer in answers]


@pytest.mark.parametrize("name", list(CHATS)[:: rounds(5, 1)])
def test_a_model_that_knows_its_chats_by_heart_says_them_and_stops(name):
    tokenizer = CHATS[name]()
    chats = [chat(q, a) for q, a in (("one", "1"), ("two", "2 and"), ("six", "6: <b>"), ("ten", "ten."))]
    model = learned_by_heart(tokenizer, chats)
    said = generate(model, tokenizer, chat_prompts(chats, tokenizer), 24, progress=False)
    assert said == [record["messages"][-1]["content"] for record in chats]
