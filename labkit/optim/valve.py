"""The safety valve: where a forward or backward pass runs out of memory, optimizer state makes room for it.

    out of memory?   half of the state that is in goes out, and the passes run again

until they fit, or no state is left. The budget stays at that half. So a run that meets longer and longer texts
pays with a failed pass now and then, and not at every step.

Why not ask beforehand how much is free: what a pass will need is known when it asks for it. CUDA's unified
memory, on which bitsandbytes' paged optimizers rest, moves pages at that very moment, and needs no second try;
but that is the driver's work, and only a driver can do it.

Source: QLoRA (Dettmers et al. 2023), section 3, "Paged Optimizers".
"""

import errno
import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from labkit.checks import is_whole
from labkit.optim.page_table import PageTable

Result = TypeVar("Result")


def run_with_room(passes: Callable[[], Result], table: PageTable, parameters: Sequence[Tensor]) -> Result:
    """Call `passes`; as often as it runs out of memory, page half of the resident state out, and call it again.

    The budget stays lowered; `set_budget` raises it. A second try draws the same random numbers from PyTorch, so
    that the results are those of a run with room enough. What else `passes` changes (the running mean of a
    layer, an iterator), it changes twice.

    Args:
        passes: all forward and backward passes of one step.
        table: the optimizer's state.
        parameters: those of the optimizer. Gradients that a failed try leaves in them are thrown away.

    Returns:
        What `passes` returns.

    Raises:
        ValueError: there are gradients already, which a failed try would spoil. Nothing was run.
        Exception: what the last try raised, if no state is left in memory.
    """
    if any(p.grad is not None for p in parameters):
        raise ValueError(
            "there are gradients already, and those of a pass that runs out of memory are thrown away; call "
            "optimizer.zero_grad() first, and run all passes of a step in one call"
        )
    device = parameters[0].device
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    while True:
        try:
            return passes()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not table.resident_bytes:
                error.add_note("no optimizer state is left in memory that could make room")
                raise
        # only here, after the exception, nothing refers to the tensors of the failed try
        for p in parameters:
            p.grad = None
        gc.collect()
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], device)
        halve(table)


def halve(table: PageTable) -> None:
    """Page out half of what is in, and let the budget be the other half: at least the largest page, and then all
    goes out, until the next step brings it in again."""
    half = table.resident_bytes // 2
    smallest = table.largest.nbytes
    table.set_budget(max(half, smallest))
    if half < smallest:
        table.make_room(table.budget)
    table.store.give_back()


def is_out_of_memory(error: BaseException) -> bool:
    """Did the GPU, or the CPU, have no memory left?"""
    says = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "can't allocate memory" in says  # PyTorch on a CPU
        or "CUDA error: out of memory" in says  # outside of PyTorch's allocator
        or "CUBLAS_STATUS_ALLOC_FAILED" in says
    )


def check_budget(budget_bytes: object) -> None:
    """Raise a `ValueError` unless this can be a budget."""
    if not is_whole(budget_bytes):
        raise ValueError(
            f"budget_bytes={budget_bytes!r} must be a positive whole number of bytes, such as 64 * 2**20"
        )
