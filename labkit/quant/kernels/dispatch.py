"""Which implementation runs: the kernels for the device of a tensor, or the readable PyTorch code.

A kernel is given addresses. That is right only for an *ordinary* tensor, whose numbers lie in memory as they read,
in a call that is made once, now, on those numbers. Everything else that looks like a tensor has another way to
compute: a derivative rides along (forward mode), `torch.func` has wrapped it, a tracer records the call, its sign
is kept apart. So what is ordinary is listed here, and not what is not: whatever PyTorch adds to it is left to
PyTorch's own operations.

numba takes a second to import, and Triton needs a GPU, so a module with kernels is imported when it is first
used. Neither has to be installed: without it, the readable code runs on its device.
"""

import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from labkit.hardware import fast_paths

OLDEST = 7, 5  # compute capability that Triton compiles for

_has_triton = importlib.util.find_spec("triton") is not None
_has_numba = importlib.util.find_spec("numba") is not None
_proxy_mode = torch._C._TorchDispatchModeKey.PROXY


def fast_for(tensor: Tensor) -> bool:
    """Is there a fast kernel for the device of `tensor`, may it read it, and are the fast paths on?"""
    return (
        fast_paths()
        and has_kernels(tensor)
        and (is_traced(tensor) or (has_numbers(tensor) and not is_transformed()))
    )


def has_kernels(tensor: Tensor) -> bool:
    """Are there kernels for the device of `tensor`?"""
    return (tensor.is_cpu and _has_numba) or (tensor.is_cuda and _has_triton and runs_triton(tensor.device))


@cache
def runs_triton(device: torch.device) -> bool:
    """Does Triton compile for this GPU? A fake one, on a machine without any, is taken for one that it does."""
    if not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= OLDEST and launches()


@cache
def launches() -> bool:
    """Can Triton launch kernels? It builds the means to do so at first, with a C compiler and Python's headers."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:
        warnings.warn(
            f"Triton cannot launch kernels here, so the slower reference runs on the GPU: {error}",
            stacklevel=2,
        )
        return False
    return True


def quantizes_scales(flat: Tensor) -> bool:
    """Is there a kernel that quantizes these scales?"""
    return fast_paths() and has_kernels(flat) and is_ordinary(flat)


def multiplies(x: Tensor, width: int) -> bool:
    """Is there a kernel that multiplies rows of `width` numbers, of an ordinary x, by a 4-bit weight?"""
    readable = has_kernels(x) and x.dtype in multiplied_dtypes(x.is_cuda)
    return fast_paths() and readable and kernels_on(x.is_cuda).multiplies(width)


def multiplied_dtypes(cuda: bool) -> tuple[torch.dtype, ...]:
    """The dtypes of an x that the kernels multiply, on a GPU or on a CPU."""
    return (torch.float32, torch.bfloat16, torch.float16) if cuda else (torch.float32,)


def is_ordinary(tensor: Tensor) -> bool:
    """Does `tensor` hold its numbers as they read, and is this call made on them, once and now?"""
    return not is_traced(tensor) and has_numbers(tensor) and not is_transformed()


def is_traced(tensor: Tensor) -> bool:
    """Is this call recorded with the operations of `operations.py` (torch.compile, torch.export, fake tensors)?"""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def is_transformed() -> bool:
    """Is this call differentiated, mapped or recorded by what does not know our operations?

    By `torch.func`, forward-mode derivatives, `torch.jit.trace`, or `make_fx`.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or (torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(_proxy_mode) is not None)
    )


def has_numbers(tensor: Tensor) -> bool:
    """Do the numbers of `tensor` lie in memory as they read? Not those of a sparse, wrapped or negated one."""
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    is_plain = keys in plain_keys("cpu") or keys in plain_keys(tensor.device.type)
    return is_plain and type(tensor) in (Tensor, nn.Parameter)


@cache
def plain_keys(device: str) -> frozenset[int]:
    """By what PyTorch decides how to compute with a tensor of `device`, if it is nothing but numbers there."""
    with torch.inference_mode(False):
        plain = torch.empty(0, device=device)
    with torch.inference_mode():
        without_gradients = torch.empty(0, device=device)
    return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in (plain, without_gradients))


@cache
def kernels_on(cuda: bool) -> ModuleType:
    """The module with the kernels for CUDA, or for a CPU."""
    if cuda:
        from labkit.quant.kernels import triton

        return triton
    from labkit.quant.kernels import cpu

    return cpu
