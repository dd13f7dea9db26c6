"""What is trained in the section on paging: a model with fp32 weights, all of which train, and a fused AdamW."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpu.machine import free_bytes
from gpu.measurement import Skipped, Stage
from gpu.stand_ins import small_llama
from labkit.data.batches import Batch
from labkit.hardware import limits
from labkit.memory import Setup, plan
from labkit.memory.random_weights import random_model
from labkit.models.shapes import config_of
from labkit.training.loss import supervised_loss

STAND_IN = small_llama(96, 256, layers=3)
TIERS = 2.5  # the state so many times over in host memory: two pagers, and what lies around them


def trained_model(stage: Stage, names: tuple[str, ...]) -> tuple[str, nn.Module]:
    """(name, model) of the first that fits with its state three times over; a small one in a rehearsal.

    Raises:
        Skipped: none fits.
    """
    setup = Setup(method="full", dtype="fp32", max_length=512, batch_size=8)
    if not stage.cuda:
        return "stand-in", random_model(STAND_IN, setup, stage.device, stage.seed)
    free, on_host = free_bytes(stage.device), limits().free
    for name in names:
        ledger = plan(config_of(name), **vars(setup))
        needed, pinned = ledger.peak + 2 * ledger["optimizer"], TIERS * ledger["optimizer"]
        if needed < free and pinned < on_host:
            return name, random_model(name, setup, stage.device, stage.seed)
    raise Skipped(
        f"full fine-tuning of {names[-1]} needs {needed / 1e9:.1f} GB of the GPU and {pinned / 1e9:.1f} GB of the host, "
        f"of which {free / 1e9:.1f} and {on_host / 1e9:.1f} GB are free"
    )


def adamw(parameters: Sequence[Tensor], lr: float = 1e-4) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW: one kernel for all parameters, or for the one that a pager shows it."""
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def state_bytes(parameters: Sequence[Tensor]) -> int:
    """What a pager's pages of AdamW's state take together: two moments and a count of steps, in frames of 4 KiB."""
    return sum(2 * p.nbytes + 4096 for p in parameters)


def backward(model: nn.Module, batch: Batch, stage: Stage) -> Tensor:
    """Gradients of a batch; in bf16 where the GPU has it, over weights in fp32. The loss per token."""
    mixed = stage.cuda and stage.dtype == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16) if mixed else contextlib.nullcontext():
        loss = supervised_loss(model, batch) / batch.n_supervised
    loss.backward()
    return loss.detach()


def folder(stage: Stage) -> str | None:
    """Where a rehearsal pages to; on a GPU that is host memory."""
    return None if stage.cuda else str(stage.scratch / "paging")
