"""Stepping any optimizer one parameter at a time, with its state in a `PageTable`: the loop of paging.

    for p in parameters:                      # instead of all at once
        page_in(state[p])                     # others go out until all that is in fits the budget
        p, state[p] = step(p, grad, state[p])

The optimizer's own `step` runs, and is shown one group with one parameter. Whatever else it does (learning
rates of groups, closures, hooks, loading a state) goes on as before.

Why the sizes are known before the first step: a trial step over tensors without numbers (PyTorch's "meta"
device) shows what a parameter's state will look like. A budget that is too small, or a disk that is too full,
is then an error while nothing has changed.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from labkit.optim.page import Page
from labkit.optim.page_table import PageTable
from labkit.optim.paged_state import PagedState
from labkit.optim.saved_state import check_state_dict, new_state, plain_step
from labkit.optim.valve import Result, check_budget, run_with_room


class Pager:
    """The state of an optimizer under a budget. Made by `attach_paging`; `with` detaches at the end.

    Attributes:
        table: the `PageTable`, with events, counts and bytes.
        state: the same as a dictionary, which `optimizer.state` is meanwhile.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, table: PageTable, prefetch: bool, fused: bool):
        self.optimizer, self.table, self.prefetch, self.fused = optimizer, table, prefetch, fused
        self.state = PagedState(table)
        self.closed = False
        self.after: dict[object, Page] = {}  # what came after a parameter the last time
        self.group_of: dict[Tensor, int] = {}
        self.in_backward: dict[Tensor, Any] = {}  # hooks of parameters that are stepped there
        self.stepped: set[Tensor] = set()  # in this backward pass
        self.previous: Tensor | None = None
        # hooks are to run once per step, and not once per parameter
        self.plain_step = plain_step(optimizer)
        self.replaced = optimizer.__dict__.get("step")

    def __enter__(self) -> "Pager":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- stepping

    def step(self, closure=None):
        """What `optimizer.step` is while this is attached."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # a scheduler that was there first has wrapped the step, and looks for this
        self.optimizer._opt_called = True
        with_grad = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.prepare(with_grad)
        self.table.step += not self.stepped  # else the step began in backward
        done = 0
        try:
            for p in with_grad:
                self.step_one(p)
                done += 1
        except BaseException as error:
            error.add_note(
                f"{done + len(self.stepped)} parameters were updated in this step, and "
                f"{len(with_grad) - done} were not; each still has the state that belongs to it. To repeat "
                "the step exactly, load the last checkpoint"
            )
            raise
        finally:
            self.stepped.clear()
        return loss

    def step_one(self, p: Tensor) -> None:
        """The optimizer's own step, over one parameter."""
        table, groups = self.table, self.optimizer.param_groups
        group, page = groups[self.group_of[p]], table.pages[p]
        table.touch(page)
        last, table.current = table.current, page
        alone = {**group, "params": [p]}
        try:
            if self.prefetch and p in self.after:
                table.prefetch(self.after[p])
            self.optimizer.param_groups = [alone]
            self.plain_step(self.optimizer)
            table.settle(page)
            if not page.is_framed():  # new, in memory that the optimizer allocated
                table.page_out(page)
            table.tidy(page)
        finally:
            self.optimizer.param_groups, table.current = groups, last
        if self.previous is not None:
            self.after[self.previous] = page
        self.previous = p
        changed = [k for k in alone if k != "params" and alone[k] is not group.get(k)]
        if changed:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} changes {changed} of its parameter groups in a step; "
                "stepping one parameter at a time would do that once per parameter, so this optimizer "
                "cannot be paged"
            )

    def step_in_backward(self, p: Tensor) -> None:
        """Called when the gradient of `p` is complete: step, and free it."""
        if self.closed or p.grad is None:
            return
        if p in self.stepped:
            raise RuntimeError(
                f"a second gradient of parameter {self.name(p)} before optimizer.step(): with "
                "fused_into_backward every backward pass is a step, so gradients cannot be accumulated over "
                "several. Attach without it, or call optimizer.step() after each backward()"
            )
        self.prepare([p])
        self.table.step += not self.stepped
        self.stepped.add(p)
        self.step_one(p)
        p.grad = None

    # --- the budget

    def set_budget(self, budget_bytes: int) -> None:
        """Another budget from now on, up or down: what it does not hold is paged out at once. No bit changes.

        Raises:
            ValueError: less than the state of the largest parameter, no number of bytes, or paging is detached.
        """
        self.check_attached()
        check_budget(budget_bytes)
        self.table.set_budget(budget_bytes)

    def make_room_for(self, passes: Callable[[], Result]) -> Result:
        """The valve: call `passes`; as often as it runs out of memory, halve the state in memory, and call it again.

            loss = pager.make_room_for(forward_and_backward)
            optimizer.step(); optimizer.zero_grad()

        Args, Returns, Raises: see `labkit.optim.valve.run_with_room`; a `ValueError` also where parameters are
        stepped in backward, or paging is detached.
        """
        self.check_attached()
        if self.fused:
            raise ValueError(
                "with fused_into_backward a failed backward pass has stepped some parameters already, and cannot "
                "be repeated; attach without it, or set_budget before a pass that needs room"
            )
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return run_with_room(passes, self.table, parameters)

    def check_attached(self) -> None:
        """Raise a `ValueError` after `close`."""
        if self.closed:
            raise ValueError("paging is detached from this optimizer; attach_paging makes another pager")

    # --- before a step

    def prepare(self, parameters: Iterable[Tensor]) -> None:
        """Refuse what cannot be stepped, and reserve room for what is new, before anything changes."""
        for p in parameters:
            self.check_gradient(p)
        if not self.stepped or any(p not in self.group_of for p in parameters):
            self.group_of = {p: n for n, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        trials: dict[tuple, dict] = {}
        new: dict[Page, dict] = {}
        for p in parameters:
            if self.fused and p not in self.in_backward:
                self.in_backward[p] = p.register_post_accumulate_grad_hook(self.step_in_backward)
            if p not in self.table.pages:
                like = self.group_of[p], p.shape, p.stride(), p.dtype, p.device
                if like not in trials:
                    trials[like] = self.trial(p)
                new[Page(p, self.name(p))] = dict(trials[like])
        self.table.plan(new)

    def check_gradient(self, p: Tensor) -> None:
        """Raise a `ValueError` if `p` has a gradient that cannot be paged."""
        if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
            kind = "complex" if p.grad.is_complex() else "sparse"
            raise ValueError(
                f"parameter {self.name(p)} of shape {tuple(p.shape)} has a {kind} gradient, which cannot be "
                "paged; make it dense and real (for nn.Embedding: sparse=False), or leave the parameter to "
                "an optimizer of its own"
            )

    def name(self, p: Tensor) -> str:
        """As `optimizer.param_groups` has it, if it was made of named parameters; else its number."""
        number = 0
        for group in self.optimizer.param_groups:
            for n, other in enumerate(group["params"]):
                if other is p:
                    return group["param_names"][n] if "param_names" in group else str(number)
                number += 1
        return "?"

    def trial(self, p: Tensor) -> dict:
        """The state that a parameter will have, to know its size."""
        try:
            return new_state(self.optimizer, p, self.optimizer.param_groups[self.group_of[p]])
        except Exception as error:
            error.add_note(
                f"in a trial step over a copy of parameter {self.name(p)}, to see what state it gets"
            )
            raise

    # --- coming and going

    @contextlib.contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """If the block raises, the optimizer is left as it was, and the store is gone."""
        try:
            yield
        except BaseException:
            for hook in self.in_backward.values():
                hook.remove()
            self.table.store.close()
            raise

    def install(self) -> None:
        """Take over the state that is there, and put the step, the state and the hooks in place."""
        pager, optimizer = self, self.optimizer
        with self.undone_on_failure():
            for p, state in optimizer.state.items():
                self.take(p, state)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.prepare([p for p in parameters if p.requires_grad])

        def step(_, closure=None):
            return pager.plain_step(optimizer, closure) if pager.closed else pager.step(closure)

        hooked: Any = torch.optim.Optimizer.profile_hook_step(step)  # with PyTorch's hooks around it
        if self.replaced is not None:
            hooked._wrapped_by_lr_sched = True
        self.installed = MethodType(hooked, optimizer)
        optimizer.step, optimizer.state, optimizer.pager = self.installed, self.state, self
        self.loading = (
            optimizer.register_load_state_dict_pre_hook(self.check_loading),
            optimizer.register_load_state_dict_post_hook(self.take_loaded_state),
        )

    def check_loading(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
        """Refuse a state that does not belong here, before anything changes."""
        self.table.check_owner()
        check_state_dict(optimizer, state_dict)

    def take_loaded_state(self, optimizer: torch.optim.Optimizer) -> None:
        """PyTorch has put a plain dictionary of loaded state in place of the paged one: page it."""
        loaded = optimizer.state
        for page in list(self.table.pages.values()):
            self.table.drop(page)
        self.table.pages.clear()
        try:
            for p in list(loaded):
                self.take(p, loaded[p])
        except Exception as error:
            self.close(keep_state=False)
            optimizer.state = loaded
            error.add_note("the state was loaded, into memory; paging is detached")
            raise
        optimizer.state = self.state

    def take(self, p: Tensor, state: dict) -> None:
        """Page the state of a parameter."""
        self.table.page(p, self.name(p))
        self.table.put(p, state)

    def close(self, keep_state: bool = True) -> None:
        """Detach: the optimizer is as it was, all its state in memory, and the store is gone.

        Args:
            keep_state: False drops the state, where it is no longer needed and might not fit.
        """
        if self.closed:
            return
        state = defaultdict(dict, self.state.items() if keep_state else ())
        self.closed = True
        for hook in (*self.in_backward.values(), *self.loading):
            hook.remove()
        self.optimizer.state = state
        del self.optimizer.pager
        if self.optimizer.__dict__.get("step") is self.installed:
            del self.optimizer.step
            if self.replaced is not None:
                self.optimizer.step = self.replaced
        self.table.close()
