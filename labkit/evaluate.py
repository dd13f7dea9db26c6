"""Is it better now? Held-out loss, generated answers, exact match.

The held-out loss is the mean over *tokens*, not over batches, in nats, and comes with its number of tokens, since a
mean without a count cannot be compared. Exact match is strict on purpose: one wrong field is a wrong answer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.data import Encoded, collate, encode_all
from labkit.loss import supervised_loss


def held_out_loss(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 8, max_length: int = 512
) -> tuple[float, int]:
    """Mean loss over the supervised tokens of `records`, in nats a token, and the number of these tokens.

    Raises:
        ValueError: no records, or none that fits into `max_length`.
    """
    examples, _ = encode_all(list(records), tokenizer, max_length)
    return loss_of_examples(model, examples, tokenizer.pad_token_id or 0, batch_size)


@torch.no_grad()
def loss_of_examples(
    model: nn.Module, examples: list[Encoded], pad_id: int, batch_size: int
) -> tuple[float, int]:
    """`held_out_loss` of encoded examples. Sorted by length, so as to pad little."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ordered = sorted(examples, key=len)
    total, tokens = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_id).to(device)
        total += supervised_loss(model, batch).item()
        tokens += batch.n_supervised
    model.train(was_training)
    return total / tokens, tokens


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 96,
    batch_size: int = 25,
    progress: bool = True,
) -> list[str]:
    """Greedy completions of `prompts`, in their order, without special tokens.

    Prompts are padded on the left, so that every one ends where its completion begins, and batched by length. Each
    completion ends at the end-of-sequence token or after `max_new_tokens`. A soft prompt or a prefix takes its part of the context.

    Raises:
        ValueError: a prompt leaves no room for `max_new_tokens` in the model's context.
    """
    device = next(model.parameters()).device
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    virtual = getattr(model, "virtual_tokens", None)  # see labkit.prompts
    taken = virtual.length if virtual is not None and virtual.enabled else 0
    room = getattr(model.config, "max_position_embeddings", math.inf) - max_new_tokens - taken
    for i, one in enumerate(ids):
        if not 0 < len(one) <= room:
            also = f" and {taken} virtual tokens before the text" if taken else ""
            raise ValueError(
                f"prompt {i} has {len(one)} tokens; with max_new_tokens={max_new_tokens}{also}, "
                + (f"1 to {room} fit" if room > 0 else "none fits")
            )
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers: list[str] = [""] * len(ids)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(ids), desc="generate", unit="prompt", disable=not progress, leave=False)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[i]) for i in chosen)
        padded = torch.full((len(chosen), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(padded)
        for row, i in enumerate(chosen):
            padded[row, width - len(ids[i]) :] = torch.tensor(ids[i])
            mask[row, width - len(ids[i]) :] = 1
        out = model.generate(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts):
            answers[i] = text.strip()
        bar.update(len(chosen))
    bar.close()
    model.train(was_training)
    return answers


def chat_prompts(records: Sequence[dict], tokenizer) -> list[str]:
    """The prompt of each chat record, up to where the assistant's answer begins."""
    return [
        tokenizer.apply_chat_template(r["messages"][:-1], tokenize=False, add_generation_prompt=True)
        for r in records
    ]


def parse_json(text: str) -> dict | None:
    """The JSON object that `text` is, or None. Nothing is mended: an answer that needs mending is a wrong one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Score:
    """Exact match of JSON answers: `exact` of `n` right in all fields, the share per field, and which were wrong."""

    exact: int
    n: int
    per_field: dict[str, float]
    valid_json: int
    wrong: list[int]

    @property
    def exact_match(self) -> float:
        return self.exact / self.n

    def __str__(self) -> str:
        fields = ", ".join(f"{name} {share:.0%}" for name, share in self.per_field.items())
        return f"exact match {self.exact}/{self.n} = {self.exact_match:.0%} (valid JSON {self.valid_json}/{self.n}; {fields})"


def score_json(answers: Sequence[str], gold: Sequence[dict]) -> Score:
    """Compare JSON answers with the objects they should be.

    Raises:
        ValueError: no answers, or not as many as gold objects.
    """
    if not answers or len(answers) != len(gold):
        raise ValueError(
            f"{len(answers)} answers for {len(gold)} gold objects; give one answer for each, at least one"
        )
    parsed = [parse_json(answer) for answer in answers]
    # True == 1 in Python: compare as JSON text, where they differ
    same = [
        p is not None and json.dumps(p, sort_keys=True) == json.dumps(g, sort_keys=True)
        for p, g in zip(parsed, gold)
    ]
    per_field = {
        name: sum((p or {}).get(name, ...) == g[name] for p, g in zip(parsed, gold)) / len(gold)
        for name in gold[0]
    }
    wrong = [i for i, ok in enumerate(same) if not ok]
    return Score(sum(same), len(gold), per_field, sum(p is not None for p in parsed), wrong)
