"""Which implementation runs: the kernels for the device of a tensor, or the readable PyTorch code.

numba takes a second to import, and Triton needs a GPU, so a module with kernels is imported when it is first
used.
"""

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from labkit.hardware import fast_paths

_has_triton = importlib.util.find_spec("triton") is not None


def fast_for(tensor: Tensor) -> bool:
    """Is there a fast kernel for the device of `tensor`, and are the fast paths on?"""
    return fast_paths() and (tensor.is_cpu or (tensor.is_cuda and _has_triton))


def quantizes_scales(flat: Tensor) -> bool:
    """Is there a kernel that quantizes these scales?"""
    return fast_paths() and flat.is_cpu and not is_traced(flat)


def multiplies(x: Tensor, width: int) -> bool:
    """Is there a kernel that multiplies rows of `width` numbers by a 4-bit weight without dequantizing it?"""
    if not fast_paths() or not x.is_cpu or x.dtype != torch.float32 or is_traced(x):
        return False
    return kernels_on(x.is_cuda).multiplies(width)


def is_traced(tensor: Tensor) -> bool:
    """Is this call recorded (torch.compile, fake tensors) rather than run on numbers?"""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


@cache
def kernels_on(cuda: bool) -> ModuleType:
    """The module with the kernels for CUDA, or for a CPU."""
    if cuda:
        from labkit.quant.kernels import triton

        return triton
    from labkit.quant.kernels import cpu

    return cpu
