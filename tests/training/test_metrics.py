"""What a model gets right: exact match of JSON, bits of facts, accuracy of labels."""

import math
import string
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from labkit.data.docstrings import load_docstrings
from labkit.data.encoding import encode
from labkit.data.facts import make_facts
from labkit.data.splits import SPLITS
from labkit.training.metrics import bits_learned, classification_accuracy, parse_json, score_json
from tests.conftest import make_small_llama
from tests.data.tokenizers import tiny_llama, word_piece


def test_exact_match_is_strict():
    gold = [{"a": "x", "b": True}] * 5
    answers = [
        '{"b": true, "a": "x"}',
        '{"a": "x", "b": 1}',
        '{"a": "x"}',
        '{"a": "x", "b": true, "c": 1}',
        "x",
    ]
    score = score_json(answers, gold)
    assert (score.exact, score.valid_json, score.wrong) == (1, 4, [1, 2, 3, 4])
    assert score.per_field == {"a": 0.8, "b": 0.6}
    assert "1/5" in str(score)


def test_nothing_is_mended():
    assert (
        parse_json("{'a': 1}") is None and parse_json('{"a": 1} extra') is None and parse_json("[1]") is None
    )


def test_missing_answers_are_an_error():
    with pytest.raises(ValueError, match="1 answers for 2 gold objects"):
        score_json(["{}"], [{}, {}])
    with pytest.raises(ValueError, match="0 answers"):
        score_json([], [])


class Fixed(nn.Module):
    """A language model in which every next-token distribution is given: `logits_of(ids)` -> (time, vocab)."""

    def __init__(self, logits_of, vocab=4096):
        super().__init__()
        self.logits_of = logits_of
        self.output = nn.Linear(vocab, vocab, bias=False).requires_grad_(False)
        nn.init.eye_(self.output.weight)

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids, use_cache=False):
        hidden = torch.stack([self.logits_of(row.tolist()) for row in input_ids])
        return SimpleNamespace(logits=self.output(hidden))


def knows(tokenizer, facts, known):
    """A model that is certain of the digits of the first `known` facts, and guesses digits for the rest."""
    digit_ids = torch.tensor([tokenizer(d, add_special_tokens=False)["input_ids"][0] for d in "0123456789"])
    memory = {}
    for fact in facts[:known]:
        one = encode(fact, tokenizer)
        memory[tuple(one.prompt)] = one.completion

    def logits_of(ids):
        scores = torch.full((len(ids), 4096), -200.0)
        scores[:, digit_ids] = 0.0
        for prompt, digits in memory.items():
            if tuple(ids[: len(prompt)]) == prompt:
                for i, digit in enumerate(digits[:-1]):
                    scores[len(prompt) - 1 + i] = -200.0
                    scores[len(prompt) - 1 + i, digit] = 0.0
        return scores

    return Fixed(logits_of)


@pytest.mark.parametrize("known", [0, 13, 40])
def test_bits_learned_are_those_of_the_facts_that_a_model_knows(tiny, known):
    _, tokenizer = tiny
    facts = make_facts(40, seed=5)
    bits = bits_learned(knows(tokenizer, facts, known), tokenizer, facts, batch_size=7)
    assert bits == pytest.approx(known * 4 * math.log2(10), abs=1e-2)


def test_a_uniform_model_and_a_wrong_one_have_learned_nothing(tiny):
    _, tokenizer = tiny
    facts = make_facts(20, seed=5)
    uniform = Fixed(lambda ids: torch.zeros(len(ids), 4096))
    assert bits_learned(uniform, tokenizer, facts) == 0.0
    liar = knows(tokenizer, [{**f, "completion": f["completion"][::-1]} for f in facts], 20)
    assert bits_learned(liar, tokenizer, facts) == 0.0


def test_half_sure_digits_count_half_their_bits(tiny):
    """Probability q on each right digit, the rest shared: the closed form is n d (log2 10 + log2 q)."""
    _, tokenizer = tiny
    facts = make_facts(10, seed=6)
    sure = knows(tokenizer, facts, 10)
    q = 0.5

    def logits_of(ids):
        return torch.log(q * sure.logits_of(ids).softmax(-1) + (1 - q) / 4096)

    bits = bits_learned(Fixed(logits_of), tokenizer, facts)
    assert bits == pytest.approx(40 * (math.log2(10) + math.log2(q + (1 - q) / 4096)), rel=1e-4)


def test_bits_learned_agrees_with_torch_on_tiny_llama(tiny):
    model, tokenizer = tiny
    facts = [{"prompt": "<|endoftext|>1 2 3 4 5 6 ", "completion": "7"}]
    ids = torch.tensor([tokenizer(facts[0]["prompt"], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)[tokenizer("7", add_special_tokens=False)["input_ids"][0]]
    expected = max(0.0, math.log2(10) + math.log2(p.item()))
    assert bits_learned(model, tokenizer, facts) == pytest.approx(expected, abs=1e-3)


def tokenizer_of_pairs():
    """A tokenizer that, like GPT-2's, has tokens of two digits."""
    pairs = [(a, b) for a in string.digits for b in string.digits]
    vocab = {token: i for i, token in enumerate([*string.printable, *map("".join, pairs)])}
    plain = Tokenizer(BPE(vocab, pairs))
    plain.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=" ")


def test_bits_learned_refuses_tokenizers_that_merge_digits_and_answers_that_are_no_numbers(tiny):
    with pytest.raises(ValueError, match="token of every digit"):
        bits_learned(tiny[0], tokenizer_of_pairs(), make_facts(2))
    with pytest.raises(ValueError, match="must be digits, not 'blue'"):
        bits_learned(*tiny, [{"prompt": "The sky is ", "completion": "blue"}])
    with pytest.raises(ValueError, match="no facts"):
        bits_learned(*tiny, [])


@pytest.fixture(scope="module")
def labelled():
    return {split: load_docstrings(split) for split in SPLITS}


def test_accuracy_reads_the_label_that_stands_highest_after_the_prompt(labelled, tiny):
    _, tokenizer = tiny
    records = labelled["test"][:10]
    label_id = {label: tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in "ABCDEFGH"}
    answers = {}
    for i, record in enumerate(records):  # right on the first 7; a token that is no label is always higher
        ids = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        wrong = "ABCDEFGH"["BCDEFGHA".index(record["completion"])]
        answers[tuple(ids)] = label_id[record["completion"] if i < 7 else wrong]

    def logits_of(ids):
        scores = torch.zeros(len(ids), 4096)
        scores[:, 1000] = 9.0
        for prompt, answer in answers.items():
            if tuple(ids[: len(prompt)]) == prompt:
                scores[len(prompt) - 1, answer] = 5.0
        return scores

    for batch_size in (1, 3, 64):
        accuracy = classification_accuracy(Fixed(logits_of), tokenizer, records, batch_size=batch_size)
        assert accuracy == 7 / 10


def test_accuracy_of_tiny_llama_is_the_same_without_batches(labelled, tiny):
    model, tokenizer = tiny
    records = labelled["test"][:20]
    ids = [tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in "ABCDEFGH"]
    right = 0
    for record in records:
        prompt = torch.tensor([tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            best = model(prompt).logits[0, -1, ids].argmax().item()
        right += "ABCDEFGH"[best] == record["completion"]
    assert classification_accuracy(model, tokenizer, records) == right / 20


PLAIN = {"prompt": "x is", "completion": "A"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: classification_accuracy(*t, load_docstrings("test"), ("A", "B")), "'A', 'B'.*got"),
        (lambda t: classification_accuracy(*t, [], ("A", "B")), "there must be records"),
        (lambda t: classification_accuracy(*t, [PLAIN], ("A", "asyncio")), "single tokens.*'asyncio'"),
    ],
)
def test_errors_name_what_is_allowed(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_labels_and_facts_are_read_as_training_reads_them():
    """A label is the token that it is behind its prompt; what a model cannot take in is refused."""
    model, tokenizer = make_small_llama(vocab_size=4096), tiny_llama()
    records = [{"prompt": "Package:", "completion": f" {label}"} for label in "AB"]
    assert classification_accuracy(model, tokenizer, records, (" A", " B")) in (0.0, 0.5, 1.0)
    pieces = word_piece()
    alike, other = {"prompt": "play ", "completion": "a"}, {"prompt": "play", "completion": "a"}
    read = partial(classification_accuracy, make_small_llama(vocab_size=len(pieces)), pieces, labels="ab")
    assert read([alike, alike]) in (0.0, 1.0)
    with pytest.raises(
        ValueError,
        match=r"the same tokens behind every prompt; 'a' is \[\d+\] in record 0 and \[\d+\] in record 1",
    ):
        read([alike, other])
    small = make_small_llama(vocab_size=4096, max_position_embeddings=8)
    with pytest.raises(ValueError, match="record 0 has .* tokens, and LlamaForCausalLM has 8 positions"):
        classification_accuracy(small, tokenizer, [{"prompt": "word " * 9, "completion": "A"}], "AB")
    with pytest.raises(ValueError, match="record 0 has .* tokens, and LlamaForCausalLM has 8 positions"):
        bits_learned(small, tokenizer, make_facts(2))
