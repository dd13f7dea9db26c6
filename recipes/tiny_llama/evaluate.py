"""How well tiny-llama and its baselines predict held-out text, in bits per byte.

Bits per byte divide by the text itself, not by the pieces that a tokenizer cuts it into, so a language model,
an n-gram model and a compressor are on one scale:

    bits per byte = −Σ log2 P(token | context) / bytes of the text in UTF-8

Each document is scored by itself, after an end-of-text token. Longer ones go through windows of 512 tokens
that overlap by half, so past the first window every token has at least 256 tokens of context.
"""

import gzip
import lzma
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from recipes.tiny_llama.corpus import DOMAINS, HELD_OUT_BYTES
from recipes.tiny_llama.ngram import KneserNey, fit
from recipes.tiny_llama.sources import Document
from recipes.tiny_llama.tokens import ids_of

WINDOW, STRIDE = 512, 256


def held_out(documents: list[Document], domain: str) -> list[str]:
    """The held-out texts of a domain."""
    return [d.text for d in documents if d.held_out and d.domain == domain]


@torch.inference_mode()
def model_nats(model, ids: list[int]) -> float:
    """−Σ ln P of the tokens ids[1:], each given those before it in its window."""
    nats, scored = 0.0, 1
    for start in range(0, max(1, len(ids) - WINDOW + STRIDE), STRIDE):
        window = torch.tensor(ids[start : start + WINDOW])
        logits = model(input_ids=window[None, :-1]).logits[0].float()  # (time − 1, vocab)
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        nats += losses[scored - start - 1 :].sum().item()
        scored = start + len(window)
    return nats


def ngram_nats(model: KneserNey, ids: list[int]) -> float:
    """−Σ ln P of the tokens ids[1:] under an n-gram model."""
    return float(-np.log(model.probabilities(np.array(ids))).sum())


def bits_per_byte(nats_of, texts: list[str], tokenizer) -> tuple[float, float]:
    """Bits per byte, and nats per token, of documents under `nats_of(ids)`; ids begin with end of text."""
    ids = ids_of(texts, tokenizer)
    nats = sum(nats_of([tokenizer.eos_token_id, *one]) for one in ids)
    n_bytes = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / n_bytes, nats / sum(map(len, ids))


def compressors() -> dict[str, Callable[[bytes], int]]:
    """Functions that say how many bytes a compressor makes of some bytes."""
    return {
        "xz -9e": lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "gzip -9": lambda data: len(gzip.compress(data, compresslevel=9, mtime=0)),
    }


def baselines(documents: list[Document], tokenizer, order: int = 5) -> dict[str, dict[str, float]]:
    """Bits per byte of every held-out domain under Kneser–Ney and under two compressors.

    "alone" compresses the held-out text by itself; "after training text" is what it adds to the compressed
    training text. gzip looks back only 32 kB, so for it the training text changes little.
    """
    ids = {
        domain: np.concatenate(
            [
                [tokenizer.eos_token_id, *one]
                for one in ids_of(
                    [d.text for d in documents if d.domain == domain and not d.held_out], tokenizer
                )
            ]
        )
        for domain in DOMAINS
    }
    rows: dict[str, dict[str, float]] = {domain: {} for domain in HELD_OUT_BYTES}
    everything = fit(np.concatenate(list(ids.values())), order, len(tokenizer))
    for domain in rows:
        texts = held_out(documents, domain)
        name = f"Kneser–Ney {order}"
        rows[domain][name], _ = bits_per_byte(lambda one: ngram_nats(everything, one), texts, tokenizer)
        if domain in ids:
            alone = fit(ids[domain], order, len(tokenizer))
            score, _ = bits_per_byte(lambda one, alone=alone: ngram_nats(alone, one), texts, tokenizer)
            rows[domain][f"{name}, own domain"] = score
    train = "".join(
        d.text for domain in DOMAINS for d in documents if d.domain == domain and not d.held_out
    ).encode()
    for name, size in compressors().items():
        before = size(train)
        for domain in rows:
            held = "".join(held_out(documents, domain)).encode()
            rows[domain][f"{name} alone"] = 8 * size(held) / len(held)
            rows[domain][f"{name} after training text"] = 8 * (size(train + held) - before) / len(held)
    return rows
