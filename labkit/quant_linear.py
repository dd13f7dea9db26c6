"""A linear layer whose frozen weight stays in four bits, also between forward and backward.

    forward:   y = x W'^T + b          W' = dequantize(packed), made, used, and dropped
    backward:  dL/dx = dL/dy W'        W' made again from the same packed bytes

The weight is frozen, so there is no dL/dW; but dL/dx needs W'. Were W' an ordinary tensor of the graph, autograd would
keep it from forward to backward, for every layer at once: the full model in 16 or 32 bits, and nothing saved. So
the autograd function below saves the *packed* weight and dequantizes twice. That costs time, one extra pass over
the weights, and never more memory than one layer.

Why W' is written to the same memory in every layer: new memory costs page faults, as much time as dequantizing itself,
and what was just written is still in the processor's cache when the multiplication reads it.

**A few tokens without gradients** (text is generated one token at a time) take another path on a CPU in fp32: for one
row of x, writing all of W' is most of the work, so a kernel adds up the products as it looks the weights up. They are
the same products, added in another order: results differ from the other path in the last bits, as they do between any
two matrix libraries. `FEW_ROWS = 0` turns this path off.

**Two dtypes** (QLoRA's "storage" and "computation" data types): the weight is stored in 4 bits, and the product is taken
in `compute_dtype`, to which x and W' are rounded first. None, the default, means that of x. bf16 pays where the processor
has matrix units for it (`labkit.hardware.product_dtype` knows); the rest of the network may stay in fp32.

This is what bitsandbytes' `MatMul4Bit` does. Source: QLoRA (Dettmers et al. 2023), section 3, equation 5.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from labkit import kernels
from labkit.models.surgery import detach_from_file, is_output_layer, replace_module
from labkit.quant import NestedScales, QuantizedTensor, check_finite, check_quantizable, quantize

FEW_ROWS = 16  # rows of x up to which not writing W' was faster than a matrix multiplication with it
SCRATCH_BYTES = 1 << 26  # a larger W' gets new memory: nothing of its size is kept when the layer is done


class Scratch(threading.local):
    """Memory for one W', which each thread keeps and every layer overwrites."""

    def __init__(self):
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.views: dict[tuple, Tensor] = {}  # of the memory, by shape and dtype

    def dequantize(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """W' in `dtype`, good until the next call in this thread."""
        # with gradients enabled (create_graph=True) autograd would keep W', and find another layer's in it
        if (
            torch.is_grad_enabled()
            or not weight.packed.is_cpu
            or kernels.is_traced(weight.packed)
            or weight.shape.numel() * dtype.itemsize > SCRATCH_BYTES
        ):
            return weight.dequantize(dtype)
        view = self.views.get((weight.shape, dtype))
        return weight.dequantize(dtype, self.new_view(weight.shape, dtype) if view is None else view)

    def new_view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        with torch.inference_mode(False):  # a tensor that is made inside could never be used outside
            if self.memory.numel() < size:
                self.memory, self.views = torch.empty(size, dtype=torch.uint8), {}
            view = self.views[shape, dtype] = self.memory[:size].view(dtype).view(shape)
        return view


_scratch = Scratch()


@contextmanager
def use_scratch(scratch: Scratch | None = None) -> Iterator[None]:
    """Within the block dequantized weights go to `scratch`; default: to a new one, since that in use may have grown with another
    model, and whoever measures would count it."""
    global _scratch
    before, _scratch = _scratch, scratch or Scratch()
    try:
        yield
    finally:
        _scratch = before


class _QuantizedLinear(torch.autograd.Function):
    """y = x W'^T + b, the product in `dtype`, with only the packed weight kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype  # packed bytes and scales: the layer's own buffers
        bias = None if bias is None else bias.to(dtype)
        y = F.linear(x.to(dtype), _scratch.dequantize(weight, dtype), bias)  # (..., in) to (..., out)
        return y if dtype == x.dtype else y.to(x.dtype)  # what autocast has chosen stays

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        to_x, _, to_bias, _ = ctx.needs_input_grad
        grad_x = None
        if to_x:  # (..., out) @ (out, in)
            grad_x = (grad.to(ctx.dtype) @ _scratch.dequantize(ctx.weight, ctx.dtype)).to(grad.dtype)
        return grad_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, None


class QuantLinear(nn.Module):
    """`nn.Linear` with a frozen 4-bit weight. Gradients flow to x and to the bias only.

    Its state is in buffers (`packed`, and `absmax` or `absmax_codes`, `absmax_absmax`, `absmax_offset`), so it moves
    between devices, is saved in a `state_dict`, and is copied, like any module; `.half()` and `.bfloat16()` change
    the dtype that it computes for, never the stored scales.

    Args:
        quantized: the weight, (out_features, in_features).
        bias: (out_features,) or None.
        compute_dtype: of the product; None for that of x.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise ValueError(
                f"compute_dtype={compute_dtype} is none to multiply in; choose torch.float32, bfloat16 or float16, or None"
            )
        self.compute_dtype = compute_dtype
        if len(quantized.shape) != 2:
            raise ValueError(f"a linear layer has a weight of two dimensions, not {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        self.codebook, self.blocksize, self.dtype = quantized.codebook, quantized.blocksize, quantized.dtype
        self.register_buffer("packed", quantized.packed)
        scales = quantized.scales
        self.double_quant = isinstance(scales, NestedScales)
        if self.double_quant:
            self.register_buffer("absmax_codes", scales.codes)
            self.register_buffer("absmax_absmax", scales.absmax)
            self.register_buffer("absmax_offset", scales.offset)
        else:
            self.register_buffer("absmax", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._weight = quantized

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        codebook: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        scale_rounding: str = "nearest",
        compute_dtype: torch.dtype | None = None,
    ) -> "QuantLinear":
        """Quantize the weight of `linear` (which is left as it is). Arguments as for `labkit.quantize`, and
        `compute_dtype` as above."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantLinear.from_linear takes an nn.Linear, not {type(linear).__name__}")
        quantized = quantize(linear.weight, codebook, blocksize, double_quant, scale_rounding)
        return cls(quantized, linear.bias, compute_dtype).train(linear.training)

    @property
    def weight(self) -> QuantizedTensor:
        """The 4-bit weight, made of this layer's buffers; the same object while they and the dtype are the same."""
        last, names = self._weight, ("absmax",)
        tensors = last.packed, last.scales
        if self.double_quant:
            names = ("absmax_codes", "absmax_absmax", "absmax_offset")
            tensors = last.packed, last.scales.codes, last.scales.absmax, last.scales.offset
        now = [self._buffers[name] for name in ("packed", *names)]
        if last.dtype is not self.dtype or any(a is not b for a, b in zip(tensors, now)):
            packed, *scales = now
            scales = NestedScales(*scales) if self.double_quant else scales[0]
            self._weight = replace(last, packed=packed, scales=scales, dtype=self.dtype)
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self.multiplies_directly(x):
            return _QuantizedLinear.apply(x, self.weight, self.bias, self.compute_dtype or x.dtype)
        y = self.weight.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def multiplies_directly(self, x: Tensor) -> bool:
        """Are there so few rows, and no gradients to come, that W' need not be made at all?"""
        return (
            x.shape[-1:] == (self.in_features,)
            and 0 < x.numel() <= FEW_ROWS * self.in_features
            and self.compute_dtype in (None, x.dtype)
            and not (torch.is_grad_enabled() and x.requires_grad)
            and kernels.multiplies(x, self.in_features)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An `nn.Linear` with the dequantized weight, frozen: what this layer computes, in 16 or 32 bits."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        # .half() would round the fp32 scales: keep them, and take the new compute dtype from the bias-like probe
        scales = {k: v for k, v in self._buffers.items() if v is not None and v.is_floating_point()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        super()._apply(fn, recurse)
        for name, before in scales.items():
            device = self._buffers[name].device
            self._buffers[name] = (
                torch.empty_like(before, device=device) if before.is_meta else before.to(device)
            )
        self._weight = self.weight  # lets go of the buffers as they were
        return self

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.double_quant else ""
        compute = f", compute_dtype={self.compute_dtype}" if self.compute_dtype else ""
        return f"{self.in_features}, {self.out_features}, {self.codebook}, blocksize={self.blocksize}{nested}{compute}"


class LayerReport(dict):
    """Bytes per layer name: `{name: (before, after)}`, with `.before`, `.after` and a table as its text."""

    @property
    def before(self) -> int:
        return sum(b for b, _ in self.values())

    @property
    def after(self) -> int:
        return sum(a for _, a in self.values())

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=5)
        rows = [f"{name:{width}}  {b / 1e6:9.3f} MB -> {a / 1e6:8.3f} MB" for name, (b, a) in self.items()]
        total = f"{'total':{width}}  {self.before / 1e6:9.3f} MB -> {self.after / 1e6:8.3f} MB"
        return "\n".join([*rows, total])


def quantize_model(
    model: nn.Module,
    codebook: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip: str | tuple[str, ...] = (),
    progress: bool = True,
    scale_rounding: str = "nearest",
    compute_dtype: torch.dtype | None = None,
) -> LayerReport:
    """Replace every `nn.Linear` of `model` by a `QuantLinear`, one after the other, in place.

    Each full weight is released before the next layer is quantized; weights that are views of a mapped file, as
    safetensors loads them, all together after the last. The output layer (`lm_head`) and embeddings keep
    their precision, and every other parameter is frozen.

    Args:
        model: any module with linear layers.
        codebook, blocksize, double_quant, scale_rounding: as for `labkit.quantize`.
        skip: a name, or several, of layers to leave alone; the last part of a name is enough.
        progress: show a progress bar.
        compute_dtype: of the products with the quantized weights; None for that of what comes in.

    Returns:
        A `LayerReport` of bytes before and after for each layer.

    Raises:
        ValueError: nothing to quantize (no linear layer, or quantized already), `skip` matches no layer, a weight is not
            finite, or a setting is none that `labkit.quantize` knows. Nothing is changed then.
        TypeError: a weight is of a dtype that cannot be quantized. Nothing is changed then.
    """
    skip = (skip,) if isinstance(skip, str) else skip
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_output_layer(model, m)
    }
    for wanted in skip:
        if not any(f".{name}".endswith(f".{wanted}") for name in linears):
            raise ValueError(f"skip={wanted!r} matches no linear layer of {type(model).__name__}")
    names = [n for n in linears if not any(f".{n}".endswith(f".{s}") for s in skip)]
    if not names:
        already = any(isinstance(m, QuantLinear) for m in model.modules())
        reason = (
            "its linear layers are quantized already"
            if already
            else "it has no linear layer besides the output"
        )
        raise ValueError(f"nothing to quantize in {type(model).__name__}: {reason}")
    settings = codebook, blocksize, double_quant, scale_rounding, compute_dtype
    QuantLinear.from_linear(nn.Linear(1, 1, device="meta"), *settings)  # may raise: before any change
    for name in names:
        check_before(name, linears[name].weight, blocksize)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    detach_from_file(model, {id(linears[name].weight) for name in names})
    report = LayerReport()
    for name in tqdm(names, desc="quantize", unit="layer", disable=not progress, leave=False):
        linear = linears.pop(name)
        layer = QuantLinear.from_linear(linear, *settings)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        replace_module(model, name, layer)
        report[name] = (linear.weight.nbytes, layer.weight.nbytes)
    return report


def check_before(name: str, weight: Tensor, blocksize: int) -> None:
    """Raise what quantizing this layer would, with its name, while no other has been replaced."""
    try:
        check_quantizable(weight, blocksize)
        check_finite(torch.stack(weight.detach().aminmax()).abs(), weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `QuantLinear` by an `nn.Linear` with the dequantized weight, in place; the inverse of
    `quantize_model` up to the quantization error, which stays in the weights. Returns `model`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            replace_module(model, name, module.to_linear(dtype))
    return model
