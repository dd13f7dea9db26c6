"""Data sets of the course, and the way from a record to token ids.

A record is a dict, either a chat, whose last message is the assistant's answer to learn,

    {"messages": [{"role": "system", "content": …}, {"role": "user", "content": …}, {"role": "assistant", "content": …}]}

or plain text: `{"prompt": "…", "completion": "…"}`. Only the completion is *supervised*: the loss is taken on its
tokens, and the prompt is context. A model trained on its prompts too spends most of its gradient on learning to
write customers' messages, which nobody asked it to do.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.paths import data_folder

IGNORE = -100  # cross_entropy's name for "no loss here"
TICKET_FIELDS = ("customer", "product", "category", "order", "urgency", "contact")
TICKET_INSTRUCTION = "Ticket to JSON."
SPLITS = ("train", "validation", "test")


def tickets(split: str) -> list[dict]:
    """Support messages with the JSON to extract: `{"id", "message", "label", "tags"}`; see data/tickets/README.md.

    Args:
        split: "train", "validation" or "test". Test has products, names and phrasings that train never shows.

    Raises:
        ValueError: another split.
        FileNotFoundError: the data folder is not there.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {SPLITS}")
    path = data_folder() / "tickets" / f"{split}.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; run from a checkout of the course, or set LABKIT_DATA to its data/"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ticket_answer(label: dict) -> str:
    """The JSON text to learn: compact, because a space after each colon and comma would be ten tokens more of 38."""
    return json.dumps(label, ensure_ascii=False, separators=(",", ":"))


def ticket_chat(ticket: dict) -> dict:
    """A ticket as a chat record: instruction, message, and the label as the JSON answer."""
    return {
        "messages": [
            {"role": "system", "content": TICKET_INSTRUCTION},
            {"role": "user", "content": ticket["message"]},
            {"role": "assistant", "content": ticket_answer(ticket["label"])},
        ]
    }


@dataclass(frozen=True)
class Encoded:
    """One record as token ids: the prompt, then the completion, which alone is supervised."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode(record: dict, tokenizer) -> Encoded:
    """Token ids of a record. Prompt and completion are tokenized apart, as they will be when the model generates.

    Raises:
        ValueError: the record has neither a chat that ends with the assistant nor prompt and completion.
    """
    if "messages" in record:
        prompt, completion = split_chat(record["messages"], tokenizer)
    else:
        missing = [field for field in ("prompt", "completion") if not isinstance(record.get(field), str)]
        if missing:
            raise ValueError(
                f"a record needs 'messages', or the texts 'prompt' and 'completion'; {missing} is missing or no text. "
                f"It has: {sorted(record)}"
            )
        prompt, completion = record["prompt"], record["completion"] + (tokenizer.eos_token or "")
    if not completion:
        raise ValueError(f"the completion is empty, so there is nothing to learn from: {record}")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
    return Encoded(*ids)


def split_chat(messages: list[dict], tokenizer) -> tuple[str, str]:
    """The chat template's text up to the assistant's last answer, and that answer with its end mark."""
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError(
            f"a chat record must end with the assistant's message; its roles are {[m.get('role') for m in messages]}"
        )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template does not write the prompt unchanged before the answer; use prompt/completion"
        )
    return prompt, whole[len(prompt) :].rstrip()  # what follows the end mark is not worth a token of loss


def encode_all(records: list[dict], tokenizer, max_length: int) -> tuple[list[Encoded], list[int]]:
    """Encode records; one longer than `max_length` tokens is left out, never cut.

    Returns:
        the encoded records, and the indices of those left out.

    Raises:
        ValueError: no records, a record that cannot be encoded (with its index), or none that fits.
    """
    if not records:
        raise ValueError("the data set is empty; there is nothing to train on")
    encoded, too_long = [], []
    for i, record in enumerate(records):
        try:
            one = encode(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from None
        if len(one) > max_length:
            too_long.append(i)
        else:
            encoded.append(one)
    if not encoded:
        raise ValueError(
            f"all {len(records)} records are longer than max_length={max_length} tokens; raise max_length"
        )
    return encoded, too_long


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (batch, time), and the targets: the same ids where supervised, IGNORE elsewhere."""

    ids: Tensor
    targets: Tensor

    @property
    def n_supervised(self) -> int:
        return int((self.targets[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.targets.to(device))


def collate(examples: list[Encoded], pad_id: int) -> Batch:
    """Pad examples on the right to the longest. Under a causal model no token sees a later one, so that the padding
    needs no attention mask: what it computes is never read."""
    width = max(len(example) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    targets = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.completion)
        targets[row, start:end] = ids[row, start:end]
    return Batch(ids, targets)


def batch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each batch of an epoch: shuffled, with neighbours of similar length together so as to pad little.

    Only windows of eight batches are sorted, and the batches are shuffled again, so that the order stays random.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 8 * batch_size
    by_length = [
        i
        for w in range(0, len(order), window)
        for i in sorted(order[w : w + window], key=lengths.__getitem__)
    ]
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def endless_batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """The batches of epoch 0, then of epoch 1, and so on; the same for the same seed."""
    epoch = 0
    while True:
        yield from batch_order(lengths, batch_size, seed, epoch)
        epoch += 1


def fingerprint(examples: list[Encoded]) -> str:
    """A short hash of encoded data: a run resumes only on the data that it began with."""
    text = json.dumps([[e.prompt, e.completion] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
