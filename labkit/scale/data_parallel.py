"""Data parallel LoRA, written out: every rank has the whole model and its share of the batch.

    g = sum over ranks of g_r        g_r: the gradient of rank r's share, of the loss divided by *all* its tokens

Only the adapters' gradients cross the wire, 2 (N - 1) / N · 4 B · P_a per rank and step. N ranks with b examples
each take the step of one process with N · b, unless each divides by its own number of tokens: DDP averages such
means, and a token of a short answer weighs more. So the ranks add up their counts first, and all divide by the sum;
under DDP, which divides by N once more, the loss is multiplied by N.

DDP also sends rank 0's *buffers* before each forward pass. The bytes of a 4-bit base are buffers: the whole base, in
every step. `replicate` turns that off.

Agrees with: `torch.nn.parallel.DistributedDataParallel`.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from labkit.data.batches import Batch
from labkit.training.loss import supervised_loss

T = TypeVar("T")


def share(items: Sequence[T], rank: int | None = None, ranks: int | None = None) -> list[T]:
    """The items of this rank: each N-th, beginning with its own number.

    Raises:
        ValueError: the ranks cannot have equally many.

    >>> share("abcdef", rank=1, ranks=3)
    ['b', 'e']
    """
    rank = dist.get_rank() if rank is None else rank
    ranks = dist.get_world_size() if ranks is None else ranks
    if len(items) % ranks or not items:
        fewer = len(items) // ranks * ranks
        raise ValueError(
            f"{len(items)} examples cannot be divided among {ranks} ranks, and a rank with fewer would leave the "
            f"others waiting; give {f'{fewer} or ' if fewer else ''}{fewer + ranks}"
        )
    return list(items[rank::ranks])


def add_up(number: float, device: torch.device | None = None) -> float:
    """The sum of a number over all ranks."""
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce the gradients, in one message, and leave the sums in their place.

    A parameter that had no part in this rank's share counts as zero: another rank may have used it.
    """
    parameters = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])  # (P_a,)
    dist.all_reduce(flat)
    start = 0
    for p, grad in zip(parameters, grads):
        p.grad = grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()


@dataclass(frozen=True)
class SharedStep:
    """A step that all ranks took together: `loss` per token, over the `supervised` tokens of all."""

    loss: float
    supervised: int


def take_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    clip: float | None = None,
    logits: str = "supervised",
) -> SharedStep:
    """One step on this rank's share of a batch, whether the model is plain, wrapped in DDP or sharded by FSDP2.

    Args:
        model: the same on every rank (`world.same_parameters` checks it).
        batch: this rank's share.
        optimizer: of the parameters that train.
        clip: largest norm of the gradient of all; None for any.
        logits: see `labkit.training.loss.supervised_loss`.

    Returns:
        The same on every rank, but for rounding.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    supervised = add_up(batch.n_supervised, batch.ids.device)
    averaged = dist.get_world_size() if averages_gradients(model) else 1
    optimizer.zero_grad(set_to_none=True)
    loss = supervised_loss(model, batch, logits) / supervised
    (loss * averaged).backward()
    if averaged == 1:
        add_gradients(parameters)
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return SharedStep(add_up(loss.item(), batch.ids.device), int(supervised))


def averages_gradients(model: nn.Module) -> bool:
    """Does the model itself average gradients over the ranks, as DDP and FSDP do?"""
    return isinstance(model, DistributedDataParallel) or any(
        is_sharded_tensor(p) for p in model.parameters() if p.requires_grad
    )


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Is it a `DTensor`, of which a rank has a part?"""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def replicate(model: nn.Module, broadcast_buffers: bool = False) -> DistributedDataParallel:
    """`model` in DDP, with the frozen bytes of a 4-bit base left where they are."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # before torch 2.13
    return DistributedDataParallel(model, **{name: broadcast_buffers})
