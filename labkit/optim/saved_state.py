"""Is a saved state a state of this optimizer, for these parameters? Asked before anything is changed.

PyTorch's `load_state_dict` compares the number of parameters, and no more. Codes of an 8-bit optimizer then load
as moments of 0 … 255, and AMSGrad's maxima are passed over. So the state is compared with one that the optimizer
makes itself, over tensors without numbers (PyTorch's "meta" device): the same names, shapes and kinds of dtype.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from labkit.checks import is_number

NOT_WRITTEN_OUT = {"amsgrad": True, "maximize": True, "decoupled_weight_decay": False}  # in our AdamW


def check_state_dict(optimizer: torch.optim.Optimizer, state_dict: Mapping) -> None:
    """Raise unless `optimizer.load_state_dict(state_dict)` goes on where the optimizer that saved it stopped.

    Args:
        optimizer: one of labkit's or PyTorch's, paged or not. Of others nothing is known: they pass.
        state_dict: what `state_dict()` of an optimizer of the same kind and parameters gave.

    Raises:
        ValueError: another kind of optimizer, other parameters, or a damaged state. Nothing was changed.
    """
    if not is_known(optimizer):
        return
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise refusal(optimizer, "it has no 'state' and 'param_groups'; give what state_dict() returned")
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    sizes = [[len(group["params"]) for group in each] for each in (saved_groups, groups)]
    if sizes[0] != sizes[1]:
        raise refusal(optimizer, f"its groups have {sizes[0]} parameters, and those here {sizes[1]}")
    known = set()
    for saved_group, group in zip(saved_groups, groups, strict=True):
        check_group(optimizer, saved_group)
        for number, p in zip(saved_group["params"], group["params"], strict=True):
            known.add(number)
            if state_dict["state"].get(number):
                check_state(optimizer, p, state_dict["state"][number], saved_group, number)
    strangers = [number for number in state_dict["state"] if number not in known]
    if strangers:
        raise refusal(optimizer, f"it has a state for {strangers}, which are in none of its groups")


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Is it an optimizer of labkit or PyTorch, or made from one of labkit's?"""
    return hasattr(optimizer, "layouts") or type(optimizer).__module__.split(".")[0] == "torch"


def refusal(optimizer: torch.optim.Optimizer, reason: str) -> ValueError:
    """The error of a state that does not belong to this optimizer."""
    return ValueError(
        f"this is not a state of {type(optimizer).__name__} with these parameters: {reason}. Nothing was "
        "changed; load it into an optimizer that is made like the one that saved it"
    )


def check_group(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    """Raise a `ValueError` unless the settings of a group are those of this kind of optimizer."""
    needed = [
        key for key, value in optimizer.defaults.items() if is_number(value) or isinstance(value, tuple)
    ]
    missing = [key for key in needed if key not in saved]
    if missing:
        raise refusal(optimizer, f"its settings lack {', '.join(missing)}")
    if hasattr(optimizer, "check_settings"):
        optimizer.check_settings(saved)
        for key, value in NOT_WRITTEN_OUT.items():
            if key in saved and bool(saved[key]) is value:
                raise refusal(optimizer, f"it was saved with {key}={saved[key]}, which torch.optim has only")


def check_state(
    optimizer: torch.optim.Optimizer, p: Tensor, saved: Mapping, group: Mapping, number: object = "?"
) -> None:
    """Raise a `ValueError` unless `saved` is a state of `p`: names, shapes, dtypes.

    Args:
        optimizer: see `check_state_dict`.
        p: the parameter.
        saved: its saved state.
        group: the settings with which it was saved.
        number: of the parameter, for the message.
    """
    reasons = []
    for layout in layouts(optimizer, p, group):
        reason = difference(saved, layout)
        if reason is None:
            return
        reasons.append(reason)
    raise refusal(optimizer, f"parameter {number} of shape {tuple(p.shape)} {reasons[0]}{whose(saved)}")


def layouts(optimizer: torch.optim.Optimizer, p: Tensor, group: Mapping) -> Iterator[Mapping]:
    """What a state of `p` may look like: dictionaries of tensors, best without numbers."""
    if hasattr(optimizer, "layouts"):
        yield from optimizer.layouts(p)
    if not type(optimizer).__module__.startswith("labkit."):
        yield new_state(optimizer, p, {**optimizer.defaults, **group})


def difference(saved: Mapping, layout: Mapping) -> str | None:
    """How a saved state differs from what it has to look like; None if it does not."""
    missing, unknown = layout.keys() - saved.keys(), saved.keys() - layout.keys()
    if missing or unknown:
        lacks = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        has = [f"has {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        return " and ".join(lacks + has)
    for name, wanted in layout.items():
        value = saved[name]
        if not isinstance(wanted, Tensor):
            continue
        if wanted.dim() == 0 and name == "step":
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if not is_number(value) or value < 0 or value != math.floor(value):
                return f"has step={value!r}, which is no number of steps"
        elif not isinstance(value, Tensor) or value.shape != wanted.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return f"has {name} of shape {found}, not {tuple(wanted.shape)}"
        elif value.dtype != wanted.dtype and not (value.is_floating_point() and wanted.is_floating_point()):
            return f"has {name} in {value.dtype}, not {wanted.dtype}"
        elif name.endswith("absmax") and not (value.isfinite() & (value >= 0)).all():
            return f"has scales in {name} that are negative, infinite or NaN"
        elif name == "exp_avg_sq" and value.is_floating_point() and (value < 0).any():
            return f"has negative numbers in {name}, a mean of squares"
    return None


def whose(saved: Mapping) -> str:
    """A guess at what saved a state."""
    if "exp_avg_absmax" in saved:
        return ", as AdamW8bit keeps it"
    if "state1" in saved or any(str(name).startswith("__bnb") for name in saved):
        return ", as an optimizer of bitsandbytes keeps it"
    return ", as an optimizer with 32-bit moments keeps it" if "exp_avg_sq" in saved else ""


# --- the state that an optimizer makes


def new_state(optimizer: torch.optim.Optimizer, p: Tensor, group: Mapping) -> dict:
    """The state that a parameter will have: from a step over a copy, without numbers if possible."""
    # an optimizer from elsewhere may keep what it saw, on the device where it saw it: never show it a meta
    # tensor
    if type(optimizer).__module__.split(".")[0] in ("torch", "labkit"):
        plain = {key: False for key in ("foreach", "fused") if key in group}  # these refuse meta tensors
        with contextlib.suppress(Exception):  # it looks at numbers: then it gets some
            state = state_after_a_step(optimizer, torch.empty_like(p, device="meta"), {**group, **plain})
            if group.get("fused") and "step" in state:  # which counts where the parameter is
                state["step"] = torch.empty_like(state["step"], device="meta")
            return state
    return state_after_a_step(optimizer, p.detach().clone(), group)


def state_after_a_step(optimizer: torch.optim.Optimizer, copy: Tensor, group: Mapping) -> dict:
    """What the optimizer keeps for `copy` after its first step, with the settings of `group`."""
    state, groups = optimizer.state, optimizer.param_groups
    copy.requires_grad_().grad = torch.zeros_like(copy)
    optimizer.state, optimizer.param_groups = defaultdict(dict), [{**group, "params": [copy]}]
    try:
        plain_step(optimizer)(optimizer)
        return optimizer.state[copy]
    finally:
        optimizer.state, optimizer.param_groups = state, groups


def plain_step(optimizer: torch.optim.Optimizer) -> Callable:
    """The step of an optimizer's class without the hooks around it."""
    step = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step
