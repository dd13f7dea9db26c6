"""A 4-bit weight stands in for the tensor that it approximates.

Other code reads the weight of a linear layer: its dtype before a cast (T5), its device, the matrix itself where a
product is fused (Mamba, attention in `torch.nn`). So a 4-bit weight answers what a tensor answers. What it is
asked about memory and place, it answers from its bytes. Whatever needs numbers is done on the dequantized weight,
made for that call. What would change numbers is refused: the change would be made to what is thrown away.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map

OPERATORS = (
    *(
        "matmul",
        "rmatmul",
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "truediv",
        "rtruediv",
        "pow",
        "neg",
        "abs",
    ),
    *("getitem", "len", "iter", "lt", "le", "gt", "ge", "float", "int", "bool", "array"),
)
OF_MEMORY = ("data_ptr", "untyped_storage", "storage", "storage_offset", "share_memory_")


class StandsIn:
    """What a `QuantizedTensor` answers as the tensor of `shape` and `dtype` that it stands for."""

    requires_grad = False
    grad = None
    grad_fn = None
    is_leaf = True
    is_sparse = False
    is_quantized = False  # PyTorch's own kind
    layout = torch.strided

    packed: Tensor
    shape: torch.Size
    dtype: torch.dtype
    dequantize: Callable[..., Tensor]
    to: Callable[..., Any]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_cuda(self) -> bool:
        return self.packed.is_cuda

    @property
    def is_cpu(self) -> bool:
        return self.packed.is_cpu

    @property
    def is_meta(self) -> bool:
        return self.packed.is_meta

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def data(self) -> Any:
        return self

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return True

    def detach(self) -> Any:
        return self

    def cpu(self) -> Any:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device = "cuda") -> Any:
        return self.to(device if isinstance(device, (str, torch.device)) else f"cuda:{device}")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise refused("requires_grad_")
        return self

    def __getattr__(self, name: str) -> Any:
        """Any other attribute or method of a tensor: that of the dequantized weight."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in OF_MEMORY or changes(name):
            raise refused(name)
        return getattr(self.dequantize(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None):
        """Any function of PyTorch: that of the dequantized weight."""
        kwargs = kwargs or {}
        target = args[:1] or tuple(kwargs.values())  # `nn.init` hands all over by name
        written = (target if changes(function.__name__) else (), kwargs.get("out"))
        if tree_any(lambda value: isinstance(value, StandsIn), written):
            raise refused(function.__name__)
        return function(*tree_map(dense, args), **tree_map(dense, kwargs))


def dense(value: Any) -> Any:
    """The tensor that a 4-bit weight stands for; any other value as it is."""
    return value.dequantize() if isinstance(value, StandsIn) else value


def changes(name: str) -> bool:
    """Does a function of this name change its first argument, by PyTorch's convention?"""
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")


def refused(name: str) -> TypeError:
    """The error about a call that would write to a temporary tensor."""
    return TypeError(
        f"{name}: a 4-bit weight cannot be changed in place, nor trained; its layer is as it was. Change the tensor "
        "that weight.dequantize() gives and quantize it again, or put an adapter on the layer"
    )


def operator(name: str) -> Callable:
    """The operator `name` of the dequantized weight."""

    def method(self: StandsIn, *others: Any) -> Any:
        return getattr(self.dequantize(), name)(*(dense(other) for other in others))

    method.__name__ = name
    return method


for _name in OPERATORS:
    setattr(StandsIn, f"__{_name}__", operator(f"__{_name}__"))
