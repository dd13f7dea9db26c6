"""What crosses the wire in a step: closed forms, which `labkit.scale.counting` holds to the byte.

Sums over all N ranks, in bytes, on a ring (`labkit.scale.ring`); a rank sends one N-th of it. P_a: numbers that
train; W: bytes of all parameters as stored.

    all-reduce of n bytes                    2 (N - 1) n
    all-gather, or reduce-scatter              (N - 1) n     n: of all pieces together, padded to N equal ones

    DDP      gradients                       2 (N - 1) · 4 P_a
    FSDP     blocks, twice; gradients        2 (N - 1) W  +  (N - 1) · 4 P_a       the root is gathered once
    tensor   activations, 4 times a block    2 (N - 1) · 4 T d b

LoRA makes DDP cheap, and not FSDP: frozen weights are gathered all the same. Four bits make W small.

Sources: ZeRO (Rajbhandari et al. 2020), section 7; PyTorch FSDP (Zhao et al. 2023), section 3.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from labkit.checks import check_positive, check_whole

# bytes per second in one direction, by data sheet; what a program gets is 70 to 90 % of it
LINKS = {
    "ethernet, 10 Gbit/s": 1.25e9,
    "ethernet, 100 Gbit/s": 12.5e9,
    "pcie 4.0 x16": 31.5e9,
    "pcie 5.0 x16": 63e9,
    "nvlink 3 (A100)": 300e9,
    "nvlink 4 (H100)": 450e9,
}
FORWARD, BACKWARD, AGAIN = (
    2,
    2,
    2,
)  # operations per frozen weight and token: no gradient of W; checkpointing runs it again


def all_reduce(nbytes: int, ranks: int) -> int:
    """Bytes that all ranks send together.

    >>> all_reduce(4_000_000, ranks=2), all_reduce(4_000_000, ranks=4) / 4
    (8000000, 6000000.0)
    """
    check_whole("ranks", ranks)
    return 2 * (ranks - 1) * nbytes


def all_gather(nbytes: int, ranks: int) -> int:
    """Bytes that all ranks send together, of pieces that make `nbytes`."""
    check_whole("ranks", ranks)
    return (ranks - 1) * nbytes


reduce_scatter = all_gather  # the same way backwards


def padded(shape: Sequence[int], itemsize: int, ranks: int) -> int:
    """Bytes of a tensor whose rows are divided among the ranks, each getting equally many.

    >>> padded((5, 3), itemsize=4, ranks=2)
    72
    """
    rows, *rest = shape
    return math.ceil(rows / ranks) * ranks * math.prod(rest) * itemsize


@dataclass(frozen=True)
class Group:
    """What FSDP gathers in one message: a block, or what is left at the root.

    Attributes:
        name: of the module.
        parameters: (shape, bytes per number, does it train?) of each.
        is_root: the root stays whole between its forward and its backward pass.
    """

    name: str
    parameters: tuple[tuple[tuple[int, ...], int, bool], ...]
    is_root: bool = False

    def nbytes(self, ranks: int, trained: bool = False) -> int:
        """Padded bytes of all parameters, or of those that train."""
        return sum(
            padded(shape, size, ranks) for shape, size, trains in self.parameters if trains or not trained
        )


def groups_of(model: nn.Module, names: Iterable[str]) -> list[Group]:
    """The groups of a model that is not divided yet, if each module of these names is one, and the root the rest."""
    groups: list[Group] = []
    taken: set[int] = set()
    for name in (*names, ""):
        found = {id(p): p for p in model.get_submodule(name).parameters() if id(p) not in taken}
        taken |= found.keys()
        parameters = tuple((tuple(p.shape), p.element_size(), p.requires_grad) for p in found.values())
        groups.append(Group(name, parameters, is_root=not name))
    return [group for group in groups if group.parameters]


def ddp_step(parameters: Iterable[torch.Tensor], ranks: int) -> int:
    """Bytes that all ranks send in a step of data parallelism, whose gradients are those of `parameters`."""
    return all_reduce(sum(p.nbytes for p in parameters), ranks)


def fsdp_step(groups: Iterable[Group], ranks: int) -> dict[str, int]:
    """Bytes that all ranks send in a step of FSDP2, by collective."""
    groups = list(groups)
    gathered = sum((1 if group.is_root else 2) * all_gather(group.nbytes(ranks), ranks) for group in groups)
    scattered = sum(reduce_scatter(group.nbytes(ranks, trained=True), ranks) for group in groups)
    return {"all_gather": gathered, "reduce_scatter": scattered}


def tensor_parallel_step(
    blocks: int, tokens: int, width: int, itemsize: int, whole: int, ranks: int
) -> dict[str, int]:
    """Bytes that all ranks send in a step of tensor parallelism: of activations, and of adapters' gradients.

    Each block adds up two outputs forward and two gradients backward; the first of all needs no gradient of its
    input, since the embedding is frozen.

    Args:
        blocks: of the model.
        tokens: of the batch.
        width: of the stream between blocks.
        itemsize: bytes of a number in it.
        whole: bytes of the halves of adapters that every rank has.
        ranks: N.
    """
    sums = 4 * blocks - 1
    return {
        "activations": sums * all_reduce(tokens * width * itemsize, ranks),
        "gradients": all_reduce(whole, ranks),
    }


def seconds(nbytes: float, link: str | float, ranks: int = 1) -> float:
    """How long a rank's part of `nbytes` takes on a link of `LINKS`, or of so many bytes per second.

    Raises:
        ValueError: there is no such link.
    """
    speed = LINKS.get(link) if isinstance(link, str) else link
    if speed is None:
        raise ValueError(
            f"link={link!r} is not known; choose one of {tuple(LINKS)}, or give bytes per second"
        )
    check_positive("link", speed)
    return nbytes / ranks / speed


def tokens_to_hide_gathering(
    bits: float, ranks: int, link: str | float, flops: float, checkpointing: bool = True
) -> float:
    """Tokens per rank and step from which FSDP's gathering can hide behind computing, whatever the model's size.

    Both grow with the number of weights: 2 (N - 1) / N · bits / 8 bytes against 4 or 6 operations per token.

    Args:
        bits: per frozen weight: 16, or 4.127 in NF4 with double quantization.
        ranks: N.
        link: see `seconds`.
        flops: operations per second that a card reaches.
        checkpointing: blocks are run again in the backward pass.

    >>> round(tokens_to_hide_gathering(16, 2, "pcie 4.0 x16", 100e12)), round(
    ...     tokens_to_hide_gathering(4.127, 2, "pcie 4.0 x16", 100e12))
    (1058, 273)
    """
    sent = 2 * (ranks - 1) / ranks * bits / 8  # bytes per weight and rank
    return seconds(sent, link) * flops / operations_per_weight(checkpointing)


def tokens_to_hide_offload(
    bits: float, ranks: int, link: str | float, flops: float, checkpointing: bool = True
) -> float:
    """Tokens per rank and step from which fetching a rank's frozen shard from its host, twice, can hide behind computing.

    Arguments as for `tokens_to_hide_gathering`; `link` is that between host and card.
    """
    return seconds(2 * bits / 8 / ranks, link) * flops / operations_per_weight(checkpointing)


def operations_per_weight(checkpointing: bool) -> int:
    """Operations per frozen weight and token: forward, the gradient of the input, and forward again."""
    return FORWARD + BACKWARD + (AGAIN if checkpointing else 0)
