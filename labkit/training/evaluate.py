"""Is it better now? Held-out loss, and generated answers.

The held-out loss is the mean over *tokens*, not over batches, in nats, and comes with its number of tokens,
since a mean without a count cannot be compared.

`labkit.data.encoding.encode` ends a completion with `<|endoftext|>`, so the loss also asks whether the text
ends here. Nobody can know that of a passage cut from a novel, and an adapter that learns how long passages
are would gain by it in every domain. `text_loss` leaves that token out: use it to compare losses on passages.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.data.batches import collate
from labkit.data.encoding import Encoded, encode_all
from labkit.training.loss import supervised_loss


def held_out_loss(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 8, max_length: int = 512
) -> tuple[float, int]:
    """Mean loss over the supervised tokens of `records`, in nats per token, and the number of these tokens.

    Raises:
        ValueError: no records, or none that fits into `max_length`.
    """
    examples, _ = encode_all(list(records), tokenizer, max_length)
    return loss_of_examples(model, examples, tokenizer.pad_token_id or 0, batch_size)


@torch.no_grad()
def loss_of_examples(
    model: nn.Module, examples: list[Encoded], pad_id: int, batch_size: int
) -> tuple[float, int]:
    """`held_out_loss` of encoded examples, in batches of similar length so as to pad little."""
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

    Prompts are padded on the left, so that every one ends where its completion begins, and batched by length.
    Each completion ends at the end-of-sequence token or after `max_new_tokens`. A soft prompt or a prefix
    takes up part of the context.

    Raises:
        ValueError: a prompt leaves no room for `max_new_tokens` in the model's context.
    """
    device = next(model.parameters()).device
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    added = getattr(model, "added_method", None)  # see labkit.alternatives.methods
    taken = 0 if added is None else added.positions
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


def text_loss(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16, max_length: int = 192
) -> tuple[float, int]:
    """Mean loss over the tokens of the completions, without the end-of-text token after them.

    Returns:
        nats per token, and the number of tokens.

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
