"""Austen, held-out text, facts, docstrings: splits are apart, passages fit and lose nothing, sheets say what is there."""

import hashlib
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from labkit import models
from labkit.data.docstrings import PACKAGES, load_docstrings
from labkit.data.encoding import encode
from labkit.data.facts import make_facts
from labkit.data.passages import HELD_OUT_DOMAINS, cut_passages, fits, load_austen, load_held_out
from labkit.data.splits import SPLITS, read_jsonl
from labkit.paths import data_folder
from labkit.training.evaluate import text_loss
from labkit.training.metrics import bits_learned, classification_accuracy


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny-llama", dtype=torch.float32)


def words(text, n):
    found = re.findall(r"\w+", text.lower())
    return set(zip(*(found[i:] for i in range(n)), strict=False))


# Passages


def test_every_passage_starts_with_the_document_token_ends_with_it_and_fits_into_192_tokens(tiny):
    _, tokenizer = tiny
    records = [r for split in SPLITS for r in load_austen(split)]
    records += [r for domain in HELD_OUT_DOMAINS for r in load_held_out(domain)]
    for record in records:
        one = encode(record, tokenizer)
        assert one.prompt == [0] and one.completion[-1] == 0 and 0 not in one.completion[:-1]
        assert len(one) <= 192 and len(record["completion"]) <= 600


@pytest.mark.parametrize("domain", HELD_OUT_DOMAINS)
def test_held_out_passages_are_the_whole_text_said_once(domain):
    rows = read_jsonl(data_folder() / "tiny-llama" / "heldout" / f"{domain}.jsonl")
    passages = [cut_passages(row["text"]) for row in rows]
    for row, cut in zip(rows, passages):
        assert "".join("".join(cut).split()) == "".join(row["text"].split())
    assert sorted(r["completion"] for r in load_held_out(domain)) == sorted(
        passage for cut in passages for passage in cut
    )


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab .,;-\n☃é", max_size=3000))
def test_passages_of_any_text_fit_and_lose_only_space(text):
    cut = cut_passages(text)
    assert all(passage and fits(passage) for passage in cut)
    assert "".join("".join(cut).split()) == "".join(text.split())


def test_passages_prefer_paragraphs_and_do_not_end_after_mr():
    first, second = "One two three four. " * 20, "Mr. Darcy bowed. " * 20
    assert cut_passages(f"{first}\n\n{second}") == [first.strip(), second.strip()]
    assert not any(passage.endswith("Mr.") for passage in cut_passages("We saw Mr. Darcy there, and " * 200))
    long = ("It is Mr. Bennet's own. " * 60).strip()
    assert len(cut_passages(long)) > 1
    assert all(passage.startswith("It is") and passage.endswith("own.") for passage in cut_passages(long))


def test_a_limit_gives_a_prefix_of_at_least_so_many_bytes_from_several_documents():
    everything = load_held_out("kjv")
    some = load_held_out("kjv", limit_bytes=8000)
    assert some == everything[: len(some)] == load_held_out("kjv", limit_bytes=8000)
    sizes = [len(r["completion"].encode()) for r in some]
    assert sum(sizes) >= 8000 > sum(sizes[:-1])
    assert len({r["name"] for r in some}) > 5
    assert load_held_out("kjv", limit_bytes=10**9) == everything


def test_text_loss_is_torchs_cross_entropy_of_the_text_without_its_end(tiny):
    model, tokenizer = tiny
    records = load_austen("test")[:5]
    total, n = 0.0, 0
    for record in records:
        ids = torch.tensor([0, *tokenizer(record["completion"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        total += F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
        n += len(ids) - 1
    loss, tokens = text_loss(model, tokenizer, records, batch_size=2)
    assert tokens == n and loss == pytest.approx(total / n, rel=1e-4)


# Austen


@pytest.fixture(scope="module")
def novels():
    return {split: load_austen(split) for split in SPLITS}


def test_austen_is_split_by_whole_novels_and_shares_no_eight_words(novels):
    names = {split: {r["novel"] for r in records} for split, records in novels.items()}
    assert [len(names[split]) for split in SPLITS] == [4, 1, 1] and len(set.union(*names.values())) == 6
    seen = {split: set().union(*(words(r["completion"], 8) for r in novels[split])) for split in SPLITS}
    assert len(seen["test"]) > 5000
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_training_passages_come_in_equal_parts_and_random_order(novels):
    size = dict.fromkeys({r["novel"] for r in novels["train"]}, 0)
    for record in novels["train"]:
        size[record["novel"]] += len(record["completion"].encode())
    assert all(149_000 < n <= 150_000 for n in size.values())
    first = [r["novel"] for r in novels["train"][:100]]
    assert all(10 < first.count(novel) < 45 for novel in size)


def test_austen_has_no_headings_wraps_italics_or_editors(novels):
    for record in (r for records in novels.values() for r in records):
        text = record["completion"]
        assert not re.search(
            r"^(?:chapter|volume) (?:[ivxl]+|\d+)$|finis$|_|  |Signet|\* \*", text, re.I | re.M
        )


def test_austens_sheet_counts_what_is_there(novels, tiny):
    _, tokenizer = tiny
    sheet = (data_folder() / "austen" / "README.md").read_text(encoding="utf-8")
    for split, records in novels.items():
        texts = [r["completion"] for r in records]
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        names = ", ".join(sorted({r["novel"] for r in records}))
        assert f"| {split} | {names} | {len(texts)} | {size} | {tokens} |" in sheet
        digest = hashlib.sha256((data_folder() / "austen" / f"{split}.jsonl").read_bytes()).hexdigest()
        assert f"| `{split}.jsonl` | `{digest}` |" in sheet


def test_austens_sheet_has_the_loss_before_adaptation(novels, tiny):
    sheet = (data_folder() / "austen" / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| validation \| (\d\.\d+) \|", sheet, re.M)
    loss, _ = text_loss(*tiny, novels["validation"])
    assert loss == pytest.approx(float(row[1]), abs=2e-3)


# Facts


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
    """A model that is certain of the digits of the first `known` facts, and of the others knows that digits follow."""
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


class Pairs:
    """A tokenizer that, like GPT-2's, has tokens of two digits."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {
            "input_ids": [
                ord(text[i]) * 256 + ord(text[i + 1 : i + 2] or " ") for i in range(0, len(text), 2)
            ]
        }

    def decode(self, ids):
        return "".join(chr(i // 256) + chr(i % 256) for i in ids)


def test_bits_learned_refuses_tokenizers_that_merge_digits_and_answers_that_are_no_numbers(tiny):
    with pytest.raises(ValueError, match="token of every digit"):
        bits_learned(tiny[0], Pairs(), make_facts(2))
    with pytest.raises(ValueError, match="must be digits, not 'blue'"):
        bits_learned(*tiny, [{"prompt": "The sky is ", "completion": "blue"}])
    with pytest.raises(ValueError, match="no facts"):
        bits_learned(*tiny, [])


# Docstrings


@pytest.fixture(scope="module")
def labelled():
    return {split: load_docstrings(split) for split in SPLITS}


def test_docstrings_are_balanced_and_as_many_as_the_sheet_says(labelled, tiny):
    _, tokenizer = tiny
    sheet = (data_folder() / "docstrings" / "README.md").read_text(encoding="utf-8")
    for split, records in labelled.items():
        each = {label: sum(r["completion"] == label for r in records) for label in PACKAGES}
        assert len(set(each.values())) == 1 and sum(each.values()) == len(records)
        modules = len({r["module"] for r in records})
        assert f"| {split} | {len(records)} | {each['A']} | {modules} |" in sheet
        for record in records:
            one = encode(record, tokenizer)
            assert one.prompt[0] == 0 and one.completion[1:] == [0] and len(one) <= 192
            assert tokenizer.decode(one.prompt[-7:]).endswith("\nPackage: ")
    for split in SPLITS:
        digest = hashlib.sha256((data_folder() / "docstrings" / f"{split}.jsonl").read_bytes()).hexdigest()
        assert f"| `{split}.jsonl` | `{digest}` |" in sheet
    assert all(len(labelled[s]) // 8 >= n for s, n in zip(SPLITS, (60, 15, 20)))
    for label, name in PACKAGES.items():
        assert f"| {label} | {name} |" in sheet


def test_no_module_and_no_near_duplicate_is_in_two_splits(labelled):
    modules = [{r["module"] for r in records} for records in labelled.values()]
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])
    texts = [words(body(r), 3) for records in labelled.values() for r in records]
    for i, one in enumerate(texts):
        for other in texts[:i]:
            assert not one or len(one & other) < 0.5 * len(one | other)
    assert len({body(r) for records in labelled.values() for r in records}) == len(texts)


def body(record):
    return record["prompt"].removeprefix("<|endoftext|>").removesuffix("\nPackage: ")


def test_no_docstring_names_its_package(labelled):
    for record in (r for records in labelled.values() for r in records):
        top = record["module"].split(".")[0].removeprefix("_py").strip("_")
        assert not re.search(rf"(?<![a-z]){top}", body(record), re.I), record
        assert 40 <= len(body(record)) <= 500


def test_the_sheets_baseline_is_naive_bayes_written_with_matrices(labelled):
    """Classes are equally frequent, so that only words count: counts @ log((count + 1) / total)."""
    vocabulary = sorted({w for r in labelled["train"] for w in re.findall(r"[a-z]+", body(r).lower())})
    index = {word: i for i, word in enumerate(vocabulary)}

    def counts(records):
        x = torch.zeros(len(records), len(index), dtype=torch.float64)
        for row, record in zip(x, records):
            for word in re.findall(r"[a-z]+", body(record).lower()):
                if word in index:
                    row[index[word]] += 1
        return x, torch.tensor(["ABCDEFGH".index(r["completion"]) for r in records])

    x, y = counts(labelled["train"])
    per_class = torch.stack([x[y == c].sum(0) for c in range(8)]) + 1
    weights = (per_class / per_class.sum(1, keepdim=True)).log()
    sheet = (data_folder() / "docstrings" / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| naive Bayes on words \| ([\d.]+) % \| ([\d.]+) % \|", sheet, re.M)
    for split, stated in zip(("validation", "test"), row.groups()):
        x, y = counts(labelled[split])
        accuracy = ((x @ weights.T).argmax(1) == y).double().mean().item()
        assert 100 * accuracy == pytest.approx(float(stated), abs=0.05)


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


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: load_austen("dev"), "split='dev'.*train.*validation.*test"),
        (lambda t: load_docstrings("all"), "split='all'.*train.*validation.*test"),
        (lambda t: load_held_out("bible"), "domain='bible'.*kjv.*devil"),
        (lambda t: load_held_out("kjv", limit_bytes=0), "limit_bytes=0 must be at least 1"),
        (lambda t: make_facts(0), "n=0.*1 to 250,000"),
        (lambda t: make_facts(5, digits=0), "digits=0.*at least 1"),
        (lambda t: make_facts(300_000), "n=300000.*1 to 250,000"),
        (
            lambda t: classification_accuracy(*t, load_docstrings("test"), ("A", "B")),
            "'A', 'B'.*got",
        ),
        (lambda t: classification_accuracy(*t, [], ("A", "asyncio")), "single tokens.*'asyncio'"),
    ],
)
def test_errors_name_what_is_allowed(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_a_missing_data_folder_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set LABKIT_DATA"):
        load_austen("test")
