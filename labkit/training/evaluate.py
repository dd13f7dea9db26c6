"""Is it better now? Held-out loss, and generated answers.

The held-out loss is the mean over *tokens*, not over batches, in nats, and comes with its number of tokens,
since a mean without a count cannot be compared.

`labkit.data.encoding.encode` ends a completion with `<|endoftext|>`, so the loss also asks whether the text
ends here. Nobody can know that of a passage cut from a novel, and an adapter that learns how long passages
are would gain by it in every domain. `text_loss` leaves that token out: use it to compare losses on passages.
"""

import math
import warnings
import weakref
from collections.abc import Collection, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.checks import check_whole
from labkit.data.batches import collate
from labkit.data.chats import chat_prompt
from labkit.data.encoding import Encoded, encode_all
from labkit.data.records import records_of, shortened
from labkit.data.tokens import prompt_ids
from labkit.models.walk import unwrap
from labkit.training.greedy import Stops, greedy, needs_solitude, stops_of
from labkit.training.limits import check_fits, check_ids, context_of, padding_id, virtual_tokens_of
from labkit.training.loss import supervised_loss
from labkit.training.readiness import check_causal, own_modes

PROBE = 8  # tokens of a prompt, to ask a model with whether it writes the same in a batch

# what each model was asked once: must its prompts be alone; and those that are causal
_needs_solitude: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def held_out_loss(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 8, max_length: int = 512
) -> tuple[float, int]:
    """Mean loss over the supervised tokens of `records`, in nats per token, and the number of these tokens.

    Records that are longer than `max_length` tokens are left out, with a warning.

    Raises:
        ValueError: no records, or none that fits into `max_length`; or a model that is not causal, or lacks
            ids or positions for one of them.
    """
    examples = examples_of(model, tokenizer, records, max_length)
    return loss_of_examples(model, examples, padding_id(tokenizer, model), batch_size)


def text_loss(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16, max_length: int = 192
) -> tuple[float, int]:
    """Mean loss over the tokens of the completions, without the end-of-text token after them.

    Returns:
        nats per token, and the number of tokens.

    Raises:
        ValueError: as `held_out_loss`.
    """
    examples = [one.without_end() for one in examples_of(model, tokenizer, records, max_length)]
    return loss_of_examples(model, examples, padding_id(tokenizer, model), batch_size)


def examples_of(model: nn.Module, tokenizer, records: Sequence[dict], max_length: int) -> list[Encoded]:
    """The records to measure, encoded, if the model can take them."""
    check_whole("max_length", max_length)
    found = records_of(records, "records")
    examples, left_out = encode_all(found, tokenizer, max_length)
    check_measurable(model, examples, left_out)
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(found)} records are longer than max_length={max_length} tokens and are left out "
            f"of the loss: {shortened(left_out)}",
            stacklevel=3,
        )
    return examples


def check_measurable(model: nn.Module, examples: list[Encoded], left_out: Collection[int] = ()) -> None:
    """Raise a `ValueError` if an example does not fit into the model, or the model is not causal."""
    check_fits(model, examples, left_out)
    check_causal_once(model, examples)


def check_causal_once(model: nn.Module, examples: list[Encoded]) -> None:
    """`check_causal`, of each model once; what is no model of transformers is not judged."""
    if (inner := unwrap(model)) not in _causal and hasattr(inner, "get_input_embeddings"):
        with torch.enable_grad():
            check_causal(model, examples, next(model.parameters()).device)
        _causal.add(inner)


@torch.no_grad()
def loss_of_examples(
    model: nn.Module, examples: list[Encoded], pad_id: int, batch_size: int
) -> tuple[float, int]:
    """`held_out_loss` of encoded examples, in batches of similar length so as to pad little.

    Raises:
        ValueError: no token of the examples is supervised, or a batch size below 1.
    """
    check_whole("batch_size", batch_size)
    device = next(model.parameters()).device
    ordered = sorted(examples, key=len)
    total, tokens = 0.0, 0
    with own_modes(model):
        model.eval()
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad_id).to(device)
            total += supervised_loss(model, batch).item()
            tokens += batch.n_supervised
    if tokens == 0:
        raise ValueError(
            f"none of the {len(examples)} examples has a supervised token, so there is no mean loss; give "
            "completions with a text, and a prompt before them"
        )
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
    Each completion ends at the mark that training teaches (`labkit.training.greedy`) or after
    `max_new_tokens`. A soft prompt or a prefix takes up part of the context.

    Args:
        model: a causal language model of transformers; its `generation_config` has no say, and stays as it is.
        tokenizer: its tokenizer.
        prompts: texts; of chats, those that `chat_prompts` makes.
        max_new_tokens: of each completion.
        batch_size: prompts at a time.
        progress: show a bar.

    Raises:
        ValueError: prompts that are no texts, ids that the model has no rows for, a prompt that leaves no room
            for `max_new_tokens` in its context, or a model that is not causal.
    """
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("batch_size", batch_size)
    ids = ids_of_prompts(model, tokenizer, prompts, max_new_tokens)
    if not ids:
        return []
    check_causal_once(model, [Encoded(one, []) for one in ids])
    device, pad_id = next(model.parameters()).device, padding_id(tokenizer, model)
    stops = stops_of(model, tokenizer)
    answers: list[str] = [""] * len(ids)
    bar = tqdm(total=len(ids), desc="generate", unit="prompt", disable=not progress, leave=False)
    with bar, own_modes(model):
        model.eval()
        for chosen in batches_of_prompts(model, ids, pad_id, batch_size):
            width = max(len(ids[i]) for i in chosen)
            padded = torch.full((len(chosen), width), pad_id)
            mask = torch.zeros_like(padded)
            for row, i in enumerate(chosen):
                padded[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, width - len(ids[i]) :] = 1
            new = greedy(model, tokenizer, padded.to(device), mask.to(device), stops, max_new_tokens, pad_id)
            for i, row_ids in zip(chosen, new.tolist()):
                answers[i] = answer_of(ids[i], row_ids, stops, tokenizer)
            bar.update(len(chosen))
    return answers


def ids_of_prompts(
    model: nn.Module, tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """The tokens of prompts, if the model can take them and write `max_new_tokens` after them."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"prompts={shortened(prompts)} must be a list of texts; of chat records, chat_prompts(records, tokenizer) "
            "makes it, and a single prompt goes into a list"
        )
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    taken, context = virtual_tokens_of(model), context_of(model)
    room = (math.inf if context is None else context) - max_new_tokens - taken
    for i, one in enumerate(ids):
        check_ids(model, one, f"prompt {i}")
        if not 0 < len(one) <= room:
            also = f" and {taken} virtual tokens before the text" if taken else ""
            raise ValueError(
                f"prompt {i} has {len(one)} tokens; with max_new_tokens={max_new_tokens}{also}, "
                + (f"1 to {room} fit" if room > 0 else "none fits")
            )
    return ids


def batches_of_prompts(
    model: nn.Module, ids: list[list[int]], pad_id: int, batch_size: int
) -> list[list[int]]:
    """The indices of each batch, of similar lengths; of one prompt where the model writes others in company."""
    inner, context = unwrap(model), context_of(model)
    room = PROBE if context is None else min(PROBE, context - virtual_tokens_of(model) - 4)
    if inner not in _needs_solitude and room > 0:
        _needs_solitude[inner] = needs_solitude(model, min(ids, key=len)[:room], pad_id)
    size = 1 if _needs_solitude.get(inner) else batch_size
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def answer_of(prompt: list[int], written: list[int], stops: Stops, tokenizer) -> str:
    """The answer in what was written behind a prompt: up to its end, without the space around it."""
    text = text_after(prompt, stops.cut(written), tokenizer)
    return (text.partition(stops.text)[0] if stops.text else text).strip()


def text_after(prompt: list[int], answer: list[int], tokenizer) -> str:
    """The text of `answer` as it reads behind its prompt, without special tokens.

    By itself, a tokenizer that puts a space before every text would read another: `##ing` where "playing" was
    written.
    """
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
    return (
        whole[len(before) :]
        if whole.startswith(before)
        else tokenizer.decode(answer, skip_special_tokens=True)
    )


def chat_prompts(records: Sequence[dict], tokenizer) -> list[str]:
    """The prompt of each chat record, up to where the assistant's answer begins, as training writes it.

    Raises:
        ValueError: a record that is no chat, or of which the template loses something; says which.
    """
    prompts: list[str] = []
    for i, record in enumerate(records_of(records, "records")):
        if "messages" not in record:
            raise ValueError(f"record {i} is no chat: it has {sorted(map(str, record))}, and not 'messages'")
        try:
            prompts.append(chat_prompt(record, tokenizer))
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from error.__cause__
    return prompts
