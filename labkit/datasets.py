"""Small data sets for measuring what an adapter learns, and what the model forgets meanwhile.

The animal of these experiments is tiny-llama. Every set answers one question:

    austen      learning a new domain: loss on a novel that nobody trained on, before and after
    held_out    forgetting the old ones: loss on the held-out text that came with tiny-llama
    facts       capacity: how many bits of random numbers fit into an adapter
    docstrings  a task with one right answer: from which part of Python's library is this docstring?

Text becomes *passages*: consecutive text of at most `MAX_CHARACTERS` and at most `MAX_TOKENS` of tiny-llama's tokens,
cut at the largest boundary that serves: between paragraphs, else lines, sentences, clauses, words. Nothing is left
out and nothing is said twice. A passage is one record for `labkit.train`: the prompt is the token `<|endoftext|>`, with
which tiny-llama expects every document to begin, and the passage is the completion, of which every token counts.

`labkit.data.encode` ends a completion with `<|endoftext|>`, and so the loss asks too whether the text ends here. Nobody
can know that of a passage cut from a novel, and an adapter that learns how long passages are gains by it in every
domain. `text_loss` leaves that token out; it is the one to compare losses of passages by.

A fact says the number of an invented name. The number is drawn uniformly from d digits, so that nothing but memory helps,
and it holds d log2(10) bits. A model that gives the digits of n facts the probabilities p has learned

    bits = n d log2(10) - sum over facts and digits of -log2 p(digit | name, digits before it),

the length of a message that a reader with the model is spared. Source: Allen-Zhu & Li, "Physics of Language Models: Part
3.3, Knowledge Capacity Scaling Laws" (2024, arXiv:2404.05405), who find about 2 bits a parameter in pretrained models.
Their count includes the names and ours does not: here the prompt gives the name.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from labkit.data import SPLITS, Encoded, collate, encode_all
from labkit.evaluate import loss_of_examples
from labkit.paths import data_folder

DOCUMENT_START = "<|endoftext|>"  # id 0 of tiny-llama's tokenizer: before every document, and after it
HELD_OUT_DOMAINS = ("kjv", "jargon", "pydocs", "docstrings", "sqlite", "devil")
PACKAGES = {  # label: part of Python's standard library
    "A": "asyncio",
    "B": "xml",
    "C": "multiprocessing and concurrent.futures",
    "D": "testing and debugging",
    "E": "mail, news and file transfer",
    "F": "http and the web",
    "G": "files and archives",
    "H": "numbers",
}
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"  # 80 syllables, 512,000 names of three
MAX_FACTS = 250_000
MAX_CHARACTERS = 600
MAX_TOKENS = 190  # and one before and one after make 192
BOUNDARIES = (  # from large to small; each cuts behind the text that it matches
    r"(?<=\n\n)",
    r"(?<=\n)",
    r"""(?:(?<=[.!?] )|(?<=[.!?]["'] ))(?<!Mr\. )(?<!Mrs\. )(?<!Dr\. )(?=["'(]?[A-Z])""",
    r"(?<=[;:,] )|(?<=--)",
    r"(?<= )",
    r"(?s)(?<=.)",
)


def austen(split: str) -> list[dict]:
    """Passages of Jane Austen's novels: `{"prompt", "completion", "novel"}`; see data/austen/README.md.

    Args:
        split: "train" (four novels), "validation" (a fifth) or "test" (a sixth). The order is random and fixed, so
            that the first n passages are a sample of the split.

    Raises:
        ValueError: another split.
        FileNotFoundError: the data folder is not there.
    """
    return [
        {"prompt": DOCUMENT_START, "completion": row["text"], "novel": row["novel"]}
        for row in rows("austen", split)
    ]


def held_out(domain: str, limit_bytes: int | None = None) -> list[dict]:
    """Passages of the held-out text of tiny-llama: `{"prompt", "completion", "name"}`, `name` being the document.

    The passages of all documents are in one random and fixed order. With `limit_bytes` you get the first of them, which
    is a sample of the whole domain and not its first document: enough of them to hold at least that many bytes.

    Args:
        domain: "kjv", "jargon", "pydocs", "docstrings" or "sqlite", which tiny-llama was trained on (on other
            documents), or "devil", which it was not.
        limit_bytes: of UTF-8 text; default: all of it (35 to 60 kB a domain).

    Raises:
        ValueError: another domain, or a limit below 1.
        FileNotFoundError: the data folder is not there.
    """
    if domain not in HELD_OUT_DOMAINS:
        raise ValueError(f"domain={domain!r} is not known; choose one of {HELD_OUT_DOMAINS}")
    if limit_bytes is not None and limit_bytes < 1:
        raise ValueError(
            f"limit_bytes={limit_bytes} must be at least 1, or None for all of the domain's text"
        )
    documents = read_jsonl(data_folder() / "tiny-llama" / "heldout" / f"{domain}.jsonl")
    records = [
        {"prompt": DOCUMENT_START, "completion": passage, "name": document["name"]}
        for document in documents
        for passage in passages(document["text"])
    ]
    random.Random(0).shuffle(records)
    if limit_bytes is None:
        return records
    size = 0
    for n, record in enumerate(records):
        size += len(record["completion"].encode())
        if size >= limit_bytes:
            return records[: n + 1]
    return records


def facts(n: int, seed: int = 0, digits: int = 4) -> list[dict]:
    """Random facts: `{"prompt": "<|endoftext|>The number of Bakilo is ", "completion": "0471"}`.

    Names are invented, distinct, and the same for every `digits`; numbers may begin with zeros. For one seed, the facts
    of a smaller n are the first of a larger.

    Raises:
        ValueError: n or digits below 1, or more facts than there are names to draw with ease.
    """
    if not 1 <= n <= MAX_FACTS or digits < 1:
        raise ValueError(f"n={n}, digits={digits}: n must be 1 to {MAX_FACTS:,}, and digits at least 1")
    draw_name, draw_digit = random.Random(f"names {seed}"), random.Random(f"digits {seed} {digits}")
    names: dict[str, None] = {}  # a set that keeps its order
    while len(names) < n:
        syllables = (draw_name.choice(CONSONANTS) + draw_name.choice(VOWELS) for _ in range(3))
        names["".join(syllables).capitalize()] = None
    return [
        {
            "prompt": f"{DOCUMENT_START}The number of {name} is ",
            "completion": "".join(draw_digit.choice("0123456789") for _ in range(digits)),
        }
        for name in names
    ]


def bits_learned(model: nn.Module, tokenizer, facts: Sequence[dict], batch_size: int = 64) -> float:
    """Bits that a model knows of the numbers in `facts`; see the module docstring for the equation.

    Only digits count, not the end-of-text token after them. A model that knows nothing has 0 bits; one that bets on
    wrong digits would have fewer, and gets 0.

    Returns:
        0 to n * digits * log2(10).

    Raises:
        ValueError: no facts, a completion that is not digits, or a tokenizer that does not make a token of every digit.
    """
    if not facts:
        raise ValueError("there are no facts to measure; make some with facts(n)")
    examples, n_digits = [], 0
    for fact in facts:
        answer = fact["completion"]
        if not re.fullmatch("[0-9]+", answer):
            raise ValueError(f"the completion of a fact must be digits, not {answer!r}")
        prompt, ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (fact["prompt"], answer)
        )
        if [tokenizer.decode([i]) for i in ids] != list(answer):
            pieces = [tokenizer.decode([i]) for i in ids]
            raise ValueError(
                f"bits are counted digit by digit, but this tokenizer cuts {answer!r} into {pieces}; use a model "
                "whose tokenizer makes a token of every digit, such as tiny-llama"
            )
        examples.append(Encoded(prompt, ids))
        n_digits += len(ids)
    mean, tokens = loss_of_examples(model, examples, tokenizer.pad_token_id or 0, batch_size)
    return max(0.0, n_digits * math.log2(10) - mean * tokens / math.log(2))


def docstrings(split: str) -> list[dict]:
    """Docstrings of Python's library and the part that each is from: `{"prompt", "completion", "module"}`.

    The completion is a letter, a key of `PACKAGES`; see data/docstrings/README.md. No module is in two splits.

    Args:
        split: "train", "validation" or "test"; as many of each class. The order is random and fixed.

    Raises:
        ValueError: another split.
        FileNotFoundError: the data folder is not there.
    """
    return [
        {
            "prompt": f"{DOCUMENT_START}{row['text']}\nPackage: ",
            "completion": row["label"],
            "module": row["module"],
        }
        for row in rows("docstrings", split)
    ]


@torch.no_grad()
def classification_accuracy(
    model: nn.Module,
    tokenizer,
    records: Sequence[dict],
    labels: Sequence[str] = tuple(PACKAGES),
    batch_size: int = 16,
) -> float:
    """Share of records whose completion is the label with the highest logit after the prompt.

    Only the labels compete: a model that would rather go on with another word is asked for its best label all the same.

    Raises:
        ValueError: no records, a completion that is not among `labels`, or labels that are not distinct single tokens.
    """
    tokens = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    if any(len(ids) != 1 for ids in tokens) or len({ids[0] for ids in tokens}) < len(labels):
        raise ValueError(f"labels must be distinct single tokens; {dict(zip(labels, tokens))} are not")
    unknown = {record["completion"] for record in records} - set(labels)
    if unknown or not records:
        raise ValueError(
            f"there must be records, and every completion one of {tuple(labels)}; got {sorted(unknown)}"
        )
    ids = torch.tensor([token for (token,) in tokens])  # (n_labels,)
    examples = [
        Encoded(tokenizer(r["prompt"], add_special_tokens=False)["input_ids"], [ids[0].item()])
        for r in records
    ]
    gold = [list(labels).index(record["completion"]) for record in records]
    order = sorted(range(len(records)), key=lambda i: len(examples[i]))
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    right = 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id or 0)
        last = torch.tensor(
            [len(examples[i].prompt) - 1 for i in chosen]
        )  # the position that predicts the label
        logits = model(input_ids=batch.ids.to(device), use_cache=False).logits  # (batch, time, vocab)
        scores = logits[torch.arange(len(chosen)), last].cpu()[:, ids]  # (batch, n_labels)
        right += (scores.argmax(dim=1) == torch.tensor([gold[i] for i in chosen])).sum().item()
    model.train(was_training)
    return right / len(records)


def text_loss(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16, max_length: int = 192
) -> tuple[float, int]:
    """Mean loss over the tokens of the completions, without the end-of-text token after them.

    Returns:
        nats a token, and the number of tokens.

    Raises:
        ValueError: no records, or none that fits into `max_length`.
    """
    examples, _ = encode_all(list(records), tokenizer, max_length)
    end = tokenizer.eos_token_id
    texts = [
        Encoded(one.prompt, one.completion[:-1] if one.completion[-1] == end else one.completion)
        for one in examples
    ]
    return loss_of_examples(model, texts, tokenizer.pad_token_id or 0, batch_size)


def passages(text: str) -> list[str]:
    """Cut a text into passages that fit, as long as may be. Joined, they are the text but for space at the cuts."""
    found: list[str] = []
    current = ""
    for piece in pieces(text, 0):
        if current and not fits(current + piece):
            found.append(current.strip())
            current = ""
        current += piece
    found.append(current.strip())
    return [passage for passage in found if passage]


def pieces(text: str, level: int) -> list[str]:
    """`text` cut at the boundaries of `level`; a piece that is still too long is cut at those of the next level."""
    if fits(text):
        return [text]
    parts = [part for part in re.split(BOUNDARIES[level], text) if part]
    return [piece for part in parts for piece in pieces(part, level + 1)]


def fits(text: str) -> bool:
    """Is `text`, without the space around it, a passage by both measures?"""
    text = text.strip()
    return len(text) <= MAX_CHARACTERS and len(tiny_llama_tokens().encode(text).ids) <= MAX_TOKENS


@lru_cache(maxsize=1)
def tiny_llama_tokens() -> Tokenizer:
    """tiny-llama's tokenizer without its model, to count tokens by."""
    return Tokenizer.from_file(str(data_folder() / "tiny-llama" / "tokenizer.json"))


def rows(name: str, split: str) -> list[dict]:
    """The lines of data/`name`/`split`.jsonl."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {SPLITS}")
    return read_jsonl(data_folder() / name / f"{split}.jsonl")


def read_jsonl(path: Path) -> list[dict]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; run from a checkout of the course, or set LABKIT_DATA to its data/"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
