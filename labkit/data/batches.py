"""From examples to batches: padding or packing, targets, and an order that pads little and stays random.

Three ways to put examples of unequal length into one tensor:

    shuffled   drawn at random, padded to the longest
    similar    drawn at random in windows, neighbours of similar length together, padded to the longest
    packed     drawn at random, one after the other in a single row, no padding

In a packed row no example may see another. Positions begin again at 0 with each, and transformers makes of that
a mask in blocks: the loss is that of the same examples, padded. "packed, unmasked" leaves this out, as trainers
that merely join texts do: every example but the first then reads those before it.

Source: "Efficient Sequence Packing without Cross-contamination" (Krell et al. 2021).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data.encoding import Encoded

IGNORE = -100  # cross_entropy's name for "no loss here"
BATCHINGS = ("similar", "shuffled", "packed", "packed, unmasked")


@dataclass(frozen=True)
class Batch:
    """Token ids (batch, time), and targets: the same ids where supervised, else IGNORE.

    `positions`, (batch, time), are those of packed examples; None for padded ones, whose are 0, 1, 2, …
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None

    @property
    def n_supervised(self) -> int:
        return int((self.targets[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), positions)

    def inputs(self) -> dict[str, Tensor]:
        """What a model of transformers is called with."""
        return {"input_ids": self.ids} | ({} if self.positions is None else {"position_ids": self.positions})


def collate(examples: list[Encoded], pad_id: int) -> Batch:
    """Pad examples on the right to the longest.

    Under a causal model no token sees a later one, so the padding needs no attention mask: nothing reads what
    is computed there.
    """
    width = max(len(example) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    targets = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.completion)
        targets[row, start:end] = ids[row, start:end]
    return Batch(ids, targets)


def pack(examples: list[Encoded], masked: bool = True) -> Batch:
    """Put examples one after the other into a single row.

    Args:
        examples: at least one.
        masked: begin the positions of each example at 0, so that it sees none before it.
    """
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += example.prompt + example.completion
        # the token before an example's first is another's last: nothing is predicted from it
        targets += [IGNORE] * max(1, len(example.prompt)) + example.completion[0 if example.prompt else 1 :]
        positions += range(len(example))
    return Batch(torch.tensor([ids]), torch.tensor([targets]), torch.tensor([positions]) if masked else None)


def make_batch_of(examples: list[Encoded], pad_id: int, batching: str = "similar") -> Batch:
    """One batch of these examples, padded or packed; see the module docstring."""
    if batching.startswith("packed"):
        return pack(examples, masked=batching == "packed")
    return collate(examples, pad_id)


def batch_order(
    lengths: list[int], batch_size: int, seed: int, epoch: int, batching: str = "similar"
) -> list[list[int]]:
    """The indices of each batch of an epoch: shuffled, and with "similar", examples of similar length together
    so as to pad little.

    Only windows of eight batches are sorted, and then the batches are shuffled, so the order stays random.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if batching != "similar":
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    window = 8 * batch_size
    by_length = [
        i
        for w in range(0, len(order), window)
        for i in sorted(order[w : w + window], key=lengths.__getitem__)
    ]
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def endless_batches(
    lengths: list[int], batch_size: int, seed: int, batching: str = "similar"
) -> Iterator[list[int]]:
    """The batches of epoch 0, then of epoch 1, and so on; always the same for the same seed."""
    epoch = 0
    while True:
        yield from batch_order(lengths, batch_size, seed, epoch, batching)
        epoch += 1
