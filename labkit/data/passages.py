"""Prose in passages: what an adapter learns (Austen's novels), and what the model forgets meanwhile (held-out
text).

    load_austen     learning a new domain: loss on a novel that the model never saw, before and after
    load_held_out   forgetting the old ones: loss on the held-out text that came with tiny-llama

A *passage* is consecutive text of at most `MAX_CHARACTERS` and at most `MAX_TOKENS` of tiny-llama's tokens,
cut at the largest boundary that makes it fit: between paragraphs, else lines, sentences, clauses, words.
Nothing is left out or repeated. A passage is one record for `labkit.train`: the prompt is the token
`<|endoftext|>`, with which tiny-llama expects every document to begin, and the passage is the completion, so
each of its tokens counts. Compare losses on passages with `labkit.training.evaluate.text_loss`.
"""

import random
import re
from functools import lru_cache

from tokenizers import Tokenizer

from labkit.checks import check_choice, check_whole
from labkit.data.splits import read_jsonl, rows
from labkit.paths import data_folder

DOCUMENT_START = "<|endoftext|>"  # id 0 of tiny-llama's tokenizer: before every document, and after it
HELD_OUT_DOMAINS = ("kjv", "jargon", "pydocs", "docstrings", "sqlite", "devil")
MAX_CHARACTERS = 600
MAX_TOKENS = 190  # one before and one after make 192

BOUNDARIES = (  # from large to small; a cut falls behind the match
    r"(?<=\n\n)",
    r"(?<=\n)",
    r"""(?:(?<=[.!?] )|(?<=[.!?]["'] ))(?<!Mr\. )(?<!Mrs\. )(?<!Dr\. )(?=["'(]?[A-Z])""",
    r"(?<=[;:,] )|(?<=--)",
    r"(?<= )",
    r"(?s)(?<=.)",
)


def load_austen(split: str) -> list[dict]:
    """Passages of Jane Austen's novels: `{"prompt", "completion", "novel"}`; see data/austen/README.md.

    Args:
        split: "train" (four novels), "validation" (a fifth) or "test" (a sixth). The order is random and
            fixed, so the first n passages are a sample of the split.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: the data folder is missing.
    """
    return [
        {"prompt": DOCUMENT_START, "completion": row["text"], "novel": row["novel"]}
        for row in rows("austen", split)
    ]


def load_held_out(domain: str, limit_bytes: int | None = None) -> list[dict]:
    """Passages of tiny-llama's held-out text: `{"prompt", "completion", "name"}`, `name` being the document.

    The passages of all documents are in one random and fixed order. With `limit_bytes` you get the first of
    them, as many as hold at least that many bytes: a sample of the whole domain, not just of its first
    document.

    Args:
        domain: "kjv", "jargon", "pydocs", "docstrings" or "sqlite", which tiny-llama was trained on (on other
            documents), or "devil", which it was not.
        limit_bytes: of UTF-8 text; default: all of it (35 to 60 kB per domain).

    Raises:
        ValueError: unknown domain, or a limit below 1.
        FileNotFoundError: the data folder is missing.
    """
    check_choice("domain", domain, HELD_OUT_DOMAINS)
    if limit_bytes is not None:
        check_whole("limit_bytes", limit_bytes, usual="None is for all of the domain's text")
    documents = read_jsonl(data_folder() / "tiny-llama" / "heldout" / f"{domain}.jsonl")
    records = [
        {"prompt": DOCUMENT_START, "completion": passage, "name": document["name"]}
        for document in documents
        for passage in cut_passages(document["text"])
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


def cut_passages(text: str) -> list[str]:
    """Cut a text into passages as long as possible; joined, they are the text up to space at the cuts."""
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
    """`text` cut at the boundaries of `level`; a piece that is still too long, at those of the next level."""
    if fits(text):
        return [text]
    parts = [part for part in re.split(BOUNDARIES[level], text) if part]
    return [piece for part in parts for piece in pieces(part, level + 1)]


def fits(text: str) -> bool:
    """Is `text`, without the space around it, short enough by both measures?"""
    text = text.strip()
    return len(text) <= MAX_CHARACTERS and len(tiny_llama_tokens().encode(text).ids) <= MAX_TOKENS


@lru_cache(maxsize=1)
def tiny_llama_tokens() -> Tokenizer:
    """tiny-llama's tokenizer without its model, to count tokens by."""
    return Tokenizer.from_file(str(data_folder() / "tiny-llama" / "tokenizer.json"))
