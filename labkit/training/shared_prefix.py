"""Answers to prompts that begin alike, with the beginning computed once: keys and values are neither made again for
each prompt nor copied to each row of a batch.

A prompt that explains a task and shows solved examples is long, and nearly all of it is the same for every record.
Let (K0, V0) be the keys and values of the p tokens that all prompts share, and (K, V) those of what follows in one
row. Its queries Q see both:

    attention = softmax([Q K0^T, Q K^T] / sqrt(d)) [V0; V]

K0 has no rows: the queries of the whole batch multiply it in one product, where copies would have to be read row by
row, for each token that is written.

Source: "Hydragen" (Juravsky et al. 2024).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.checks import check_whole
from labkit.data.encoding import Encoded
from labkit.models.walk import unwrap
from labkit.training.evaluate import (
    answer_of,
    batches_of_prompts,
    check_causal_once,
    generate,
    ids_of_prompts,
)
from labkit.training.greedy import Stops, stops_of
from labkit.training.limits import padding_id, virtual_tokens_of
from labkit.training.readiness import own_modes

NAME = "labkit_shared_prefix"  # of this attention, for transformers
SHORTEST = 16  # shared tokens for which it is worth while


@torch.no_grad()
def generate_shared(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 96,
    batch_size: int = 25,
    progress: bool = True,
) -> list[str]:
    """What `labkit.training.evaluate.generate` writes, the tokens with which all prompts begin computed once.

    A model whose attention transformers cannot exchange, or which has virtual tokens, answers by `generate`; so does
    any whose next token's logits differ from those of its own forward pass.

    Args:
        model, tokenizer, prompts, max_new_tokens, batch_size, progress: see `generate`.

    Raises:
        ValueError: as `generate`.
    """
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("batch_size", batch_size)
    ids = ids_of_prompts(model, tokenizer, prompts, max_new_tokens)
    shared = common_start(ids)
    with own_modes(model):
        model.eval()
        if len(ids) < 2 or shared < SHORTEST or virtual_tokens_of(model) or not can_share(model, ids, shared):
            return generate(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
        check_causal_once(model, [Encoded(one, []) for one in ids])
        pad_id, stops = padding_id(tokenizer, model), stops_of(model, tokenizer)
        answers = [""] * len(ids)
        bar = tqdm(total=len(ids), desc="generate", unit="prompt", disable=not progress, leave=False)
        with bar, sharing(model, ids[0][:shared]) as step:
            for chosen in batches_of_prompts(model, ids, pad_id, batch_size):
                rows = [ids[i][shared:] for i in chosen]
                written = greedy_after(step, shared, rows, stops, max_new_tokens, pad_id, tokenizer)
                for i, new in zip(chosen, written):
                    answers[i] = answer_of(ids[i], new, stops, tokenizer)
                bar.update(len(chosen))
    return answers


def common_start(ids: list[list[int]]) -> int:
    """How many tokens all prompts begin with, at least one of each left over."""
    if not ids:
        return 0
    first, last = min(ids), max(ids)  # in the order of a dictionary: what these two share, all do
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return min(same, min(map(len, ids)) - 1)


def attention(cache) -> Callable:
    """The attention of the module docstring, as transformers calls it; `cache` has the shared keys and values."""

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        batch, heads, time, width = query.shape
        layer = cache.layers[module.layer_idx]
        before, content = layer.keys[0], layer.values[0]  # (kv_heads, shared, width)
        groups, scale = heads // len(before), width**-0.5 if scaling is None else scaling
        grouped = query.view(batch, len(before), groups, time, width) * scale
        # the rows of the batch are more queries to the same keys: (kv_heads, batch * groups * time, width)
        flat = grouped.transpose(0, 1).reshape(len(before), -1, width)
        to_shared = (flat @ before.mT).view(len(before), batch, groups, time, -1).transpose(0, 1)
        to_own = (
            grouped @ key[:, :, None].mT + attention_mask[:, :, None]
        )  # (batch, kv_heads, groups, time, own)
        weights = torch.cat([to_shared, to_own], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
        of_shared, of_own = weights.split([before.shape[1], key.shape[2]], dim=-1)
        flat = of_shared.transpose(0, 1).reshape(len(before), -1, before.shape[1])
        out = (flat @ content).view(len(before), batch, groups, time, -1).transpose(0, 1)
        out = (out + of_own @ value[:, :, None]).reshape(batch, heads, time, -1)
        return out.transpose(1, 2).contiguous(), None

    return attend


@contextmanager
def sharing(model: nn.Module, prefix: list[int]) -> Iterator[Callable]:
    """Within the block the model's attention also sees `prefix`; gives a function that calls it behind that."""
    from transformers import AttentionInterface, AttentionMaskInterface  # late: it takes seconds
    from transformers.masking_utils import eager_mask

    inner, device = unwrap(model), next(model.parameters()).device
    cache = model(
        input_ids=torch.tensor([prefix], device=device), use_cache=True, logits_to_keep=1
    ).past_key_values
    AttentionInterface.register(NAME, attention(cache))
    AttentionMaskInterface.register(NAME, eager_mask)
    before = inner.config._attn_implementation

    def step(ids: Tensor, mask: Tensor, positions: Tensor, own) -> tuple[Tensor, object]:
        """Logits of the next token, (batch, vocab), and the keys and values of the rows so far."""
        out = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=own,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], out.past_key_values

    inner.set_attn_implementation(NAME)
    try:
        yield step
    finally:
        inner.set_attn_implementation(before)


def can_share(model: nn.Module, ids: list[list[int]], shared: int) -> bool:
    """Are the logits after a prompt, its beginning shared, those of the model's own forward pass?"""
    one = min(ids, key=len)
    device = next(model.parameters()).device
    try:
        own = model(input_ids=torch.tensor([one], device=device), use_cache=False).logits[0, -1].float()
        rest = torch.tensor([one[shared:]])
        with sharing(model, one[:shared]) as step:
            positions = shared + torch.arange(rest.shape[1])[None]
            ours = step(rest, torch.ones_like(rest), positions, None)[0][0].float()
    except (AttributeError, TypeError, ValueError):  # another kind of attention, of cache, or of arguments
        return False
    spread = own - own.mean()
    return bool((ours - own).norm() <= 0.1 * spread.norm())  # rounding is far less


def greedy_after(
    step: Callable,
    shared: int,
    rows: list[list[int]],
    stops: Stops,
    limit: int,
    pad_id: int,
    tokenizer,
) -> list[list[int]]:
    """The tokens that follow each row, up to `limit`, each the one with the largest logit.

    Args:
        step: of `sharing`.
        shared: tokens before the rows.
        rows: token ids; they are padded on the left.
        stops: where a row ends.
        limit: new tokens at most.
        pad_id: fills up a row.
        tokenizer: reads what has been written, where a text ends it.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = shared + (mask.cumsum(1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in rows]
    is_open = [True] * len(rows)
    own = None
    for _ in range(limit):
        logits, own = step(ids, mask, positions, own)
        chosen = logits.argmax(-1).tolist()
        for row, token in enumerate(chosen):
            if is_open[row]:
                written[row].append(token)
                ended = token in stops.ids or (stops.text and stops.text in tokenizer.decode(written[row]))
                is_open[row] = not ended
        if not any(is_open):
            break
        ids = torch.tensor(chosen)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return written
