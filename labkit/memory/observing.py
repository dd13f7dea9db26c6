"""A measurement leaves what it measures as it found it, also if it fails.

A training step changes almost everything: weights, gradients, moments, step counts, running means, the state of
random generators; and to watch it takes hooks and modes. All of it is noted before, and put back afterwards, into
the very same objects: to the bit, and without a trace for autograd, so that a loss that was computed before can
still be differentiated. Only what the caller's own hooks do, and CUDA's record of its peak, cannot be undone.
"""

import copy
import os
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from labkit.optim.paged_state import PagedState
from labkit.quant.linear import QuantLinear

CONTAINERS = (dict, OrderedDict, set, list)
PAGING_LOG = ("step", "counts", "events", "bytes_in", "bytes_out", "seconds_waiting", "peak_bytes")


@contextmanager
def left_as_found(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, steps may be taken; after it, `model`, `optimizer` and the process are as before.

    It takes a copy of all that trains, and of the optimizer's state. Gradients are put aside in the block.
    """
    of_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = list(dict.fromkeys([*model.parameters(), *of_optimizer]))
    objects = [*model.modules(), optimizer]
    objects += [value for name in ("config", "generation_config") if (value := getattr(model, name, None))]
    with ExitStack() as stack:
        stack.enter_context(same_generators())
        stack.enter_context(same_environment())
        stack.enter_context(same_state(optimizer))
        stack.enter_context(same_attributes(objects))
        stack.enter_context(same_numbers([*changing(model), *of_optimizer]))
        stack.enter_context(same_gradients(parameters))
        stack.enter_context(torch.enable_grad())
        yield


def changing(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a model that a training step may change: what trains, and buffers, such as running means."""
    yield from (p for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        if not isinstance(module, QuantLinear):  # whose buffers are its frozen weight
            yield from module.buffers(recurse=False)


@contextmanager
def same_generators() -> Iterator[None]:
    """Random numbers go on as if none had been drawn in the block."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def same_environment() -> Iterator[None]:
    """Environment variables are afterwards what they were."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextmanager
def same_attributes(objects: Iterable[object]) -> Iterator[None]:
    """Attributes have the values that they had, and dictionaries and lists among them (hooks) what they held."""
    before = [
        (
            vars(one),
            {name: (v, copy.copy(v) if type(v) in CONTAINERS else None) for name, v in vars(one).items()},
        )
        for one in objects
    ]
    try:
        yield
    finally:
        for attributes, saved in before:
            for name in attributes.keys() - saved.keys():
                del attributes[name]
            for name, (value, content) in saved.items():
                attributes[name] = value
                if content is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)


@contextmanager
def same_numbers(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors hold the bits that they held, and autograd does not know that they ever held others."""
    tensors = tuple(t for t in dict.fromkeys(tensors) if not t.is_inference())
    before = [t.detach().clone() for t in tensors]
    with torch.autograd._unsafe_preserve_version_counter(tensors):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)


@contextmanager
def same_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients are put aside, and are there again afterwards; the same parameters need one."""
    before = [(p.grad, p.requires_grad) for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, (grad, needed) in zip(parameters, before, strict=True):
            p.grad = grad
            p.requires_grad_(needed)


@contextmanager
def same_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The state, the settings of groups, and the log of a pager are what they were."""
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    paged = isinstance(optimizer.state, PagedState)
    table = optimizer.state.table if paged else None
    log = {name: copy.copy(getattr(table, name)) for name in PAGING_LOG} if paged else {}
    before = {
        key: ({}, state) if paged else (state, {name: copied(value) for name, value in state.items()})
        for key, state in optimizer.state.items()
    }
    try:
        yield
    finally:
        for group, saved in groups:
            group.clear()
            group.update(saved)
        for key in [key for key in optimizer.state if key not in before]:
            del optimizer.state[key]
        for key, (state, values) in before.items():
            if paged:
                optimizer.state[key] = values
            else:
                put_back(state, values)
                optimizer.state[key] = state
        for name, value in log.items():
            setattr(table, name, value)


def copied(value: object) -> object:
    """(the value itself, a copy of it)."""
    return value, value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def put_back(state: dict, values: dict) -> None:
    """Give a state the entries that it had, in the tensors that it had."""
    state.clear()
    for name, (value, copy_of_it) in values.items():
        if isinstance(value, Tensor):
            with torch.no_grad():
                value.copy_(copy_of_it)
        state[name] = value if isinstance(value, Tensor) else copy_of_it
