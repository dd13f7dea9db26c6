"""From examples to batches: padding, targets, and an order that pads little and stays random."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data.encoding import Encoded

IGNORE = -100  # cross_entropy's name for "no loss here"


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (batch, time), and targets: the same ids where supervised, else IGNORE."""

    ids: Tensor
    targets: Tensor

    @property
    def n_supervised(self) -> int:
        return int((self.targets[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.targets.to(device))


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


def batch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of each batch of an epoch: shuffled, with examples of similar length together so as to pad
    little.

    Only windows of eight batches are sorted, and then the batches are shuffled, so the order stays random.
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
    """The batches of epoch 0, then of epoch 1, and so on; always the same for the same seed."""
    epoch = 0
    while True:
        yield from batch_order(lengths, batch_size, seed, epoch)
        epoch += 1
