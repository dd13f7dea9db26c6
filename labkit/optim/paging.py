"""A paged optimizer: its state under a budget of bytes, and the rest on disk (for a GPU: in host memory).

An optimizer needs the state of a parameter once per step, while it updates that parameter. So step one
parameter at a time, and before each, page its state in, and that of others out. The loop is
`labkit.optim.pager`, the pages are `labkit.optim.page_table`, the disk is `labkit.optim.page_store`.

Why parameter by parameter: `step` first collects the state of *all* parameters. Paging alone would bring
everything in before the first update. Here the optimizer's own `step` runs, and sees one parameter, so the
numbers are the same.

Source: QLoRA (Dettmers et al. 2023), section 3, "Paged Optimizers". bitsandbytes pages with CUDA's unified
memory, and only tensors of 100,000 numbers or more (`min_elements`).
Agrees, bit for bit, with: the same optimizer without paging (of `foreach=True`: with steps of one parameter).
"""

from pathlib import Path

import torch

from labkit.checks import check_choice, check_whole
from labkit.optim.adamw import AdamW
from labkit.optim.page_store import FileStore
from labkit.optim.page_table import POLICIES, PageTable
from labkit.optim.paged_state import PagedState
from labkit.optim.pager import Pager
from labkit.optim.pinned_store import PinnedStore
from labkit.optim.valve import check_budget


def attach_paging(
    optimizer: torch.optim.Optimizer,
    budget_bytes: int,
    store: str | Path | None = None,
    policy: str = "lru",
    min_elements: int = 0,
    prefetch: bool = True,
    fused_into_backward: bool = False,
) -> Pager:
    """Keep the state of an optimizer under `budget_bytes` from now on. Its results do not change.

    `state_dict` and `load_state_dict` work as before: a checkpoint does not show whether paging was on. (Both
    need memory for all of the state while they run; the dictionary is a copy, not a view.) So do learning rate
    schedulers, closures, hooks and new parameter groups. A copy of the optimizer (deepcopy, pickle, a spawned
    process) has all of its state in memory and no pager; a *forked* process may not use the pager.

    A budget may be all of the state, and paging a safety valve: the pager's `make_room_for` pages state out where a
    pass runs out of memory, and `set_budget` whenever you like.

    With `fused_into_backward` each parameter is stepped the moment its gradient is complete, and the gradient
    freed. **Clipping then has nothing to clip:** the norm of all gradients is known only when all are there,
    and `clip_grad_norm_` after the backward pass finds none. Nor can a step be skipped because its loss was
    NaN. Accumulating over several backward passes is refused.

    Args:
        optimizer: any of PyTorch's but LBFGS, or one like them that updates every parameter by itself.
        budget_bytes: largest size of the state in memory; at least that of the largest parameter's state.
        store: folder for the state that is out, on a disk (default: labkit's cache folder). Not for a GPU,
            where it goes to pinned host memory: as much as all of the state, from now on.
        policy: "lru" or "mru"; see `labkit.optim.page_table`.
        min_elements: tensors with fewer numbers stay in memory, and outside the budget. bitsandbytes:
            100,000.
        prefetch: read the next parameter's state while this one is stepped, where both fit the budget.
        fused_into_backward: see above.

    Returns:
        The `Pager`, which is also `optimizer.pager`; its `.close()` or `detach_paging(optimizer)` undoes it.

    Raises:
        TypeError: an optimizer that cannot be paged.
        ValueError: a budget that is too small or not a number of bytes, an unknown policy, a second pager, or
            parameters that are neither on a CPU nor on one GPU.
        OSError: a store that cannot be written to, or is too small. Nothing was changed.
        MemoryError: for a GPU, the host has no memory left to pin. Nothing was changed.

    >>> weight = torch.nn.Parameter(torch.ones(1000))
    >>> optimizer = torch.optim.AdamW([weight], lr=0.1)
    >>> pager = attach_paging(optimizer, budget_bytes=10_000)
    >>> weight.sum().backward(); optimizer.step()
    >>> pager.table.resident_bytes
    0
    >>> weight.sum().backward(); optimizer.step()  # a new state goes to the store, and comes back when needed
    >>> pager.table.resident_bytes  # 8,004 bytes, in frames of 4 KiB
    8192
    >>> detach_paging(optimizer)
    """
    check_settings(budget_bytes, policy, min_elements, prefetch, fused_into_backward)
    check_optimizer(optimizer)
    page_store = store_for(device_of(optimizer), store)
    table = PageTable(page_store, budget_bytes, policy, min_elements)
    pager = Pager(optimizer, table, prefetch, fused_into_backward)
    pager.install()
    return pager


def check_settings(
    budget_bytes: object, policy: object, min_elements: object, prefetch: object, fused_into_backward: object
) -> None:
    """Raise a `ValueError` unless all of them can be."""
    check_budget(budget_bytes)
    check_choice("policy", policy, POLICIES)
    check_whole("min_elements", min_elements, at_least=0)
    check_choice("prefetch", prefetch, (True, False))
    check_choice("fused_into_backward", fused_into_backward, (True, False))


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise a `TypeError` or a `ValueError` unless this optimizer can be paged, and is not paged yet."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS updates all parameters together; it cannot be stepped one parameter at a time, so it "
            "cannot be paged"
        )
    if isinstance(optimizer.state, PagedState):
        raise ValueError(
            "this optimizer is paged already; detach_paging(optimizer) first, to attach with other settings"
        )
    step = optimizer.__dict__.get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "something else has replaced optimizer.step; attach paging first, and that afterwards"
        )


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """The one device of all parameters; a `ValueError` unless that is the CPU or a GPU."""
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"the parameters are on {', '.join(sorted(map(str, devices)))}; paging needs them all on the "
            "CPU or all on one GPU"
        )
    return devices.pop()


def store_for(device: torch.device, folder: str | Path | None) -> FileStore | PinnedStore:
    """Where the state of parameters on `device` goes."""
    if device.type == "cpu":
        return FileStore(folder)
    if folder is not None:
        raise ValueError(
            f"store={folder!r}: on a GPU the state that is out goes to pinned host memory; leave store out"
        )
    return PinnedStore(device)


def detach_paging(optimizer: torch.optim.Optimizer, keep_state: bool = True) -> None:
    """Undo `attach_paging`, if it was called: all state is back in memory, or dropped if not `keep_state`."""
    if isinstance(optimizer.state, PagedState):
        optimizer.pager.close(keep_state)


class PagedAdamW(AdamW):
    """`AdamW` with its state under a budget.

    Args:
        params, lr, adam: see `AdamW`; `adam` is betas, eps and weight_decay.
        budget_bytes, store, policy, min_elements, prefetch, fused_into_backward: see `attach_paging`.

    Attributes:
        pager: the `Pager`.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        *,
        budget_bytes: int,
        store: str | Path | None = None,
        policy: str = "lru",
        min_elements: int = 0,
        prefetch: bool = True,
        fused_into_backward: bool = False,
        **adam,
    ):
        super().__init__(params, lr, **adam)
        attach_paging(self, budget_bytes, store, policy, min_elements, prefetch, fused_into_backward)
