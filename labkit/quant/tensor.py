"""A weight in four bits: `quantize` makes a `QuantizedTensor`, and `.dequantize()` an approximation of it.

What happens to the numbers stands in `labkit.quant.blockwise`, which is written to be read. Where
`labkit.quant.kernels` has a fast path for the same call, that runs instead, with the same bits.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from labkit.checks import check_choice
from labkit.quant.blockwise import (
    NESTED_BLOCKSIZE,
    dequantize_blocks,
    lookup_blocks,
    pack,
    quantize_blocks,
    unpack,
)
from labkit.quant.codebooks import codebook as levels_of
from labkit.quant.codebooks import codes_by_rank
from labkit.quant.config import SCALE_ROUNDINGS, QuantConfig
from labkit.quant.fields import check_dtype, check_fields
from labkit.quant.kernels import operations
from labkit.quant.kernels.dispatch import fast_for, is_ordinary, multiplied_dtypes, quantizes_scales
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.stand_in import StandsIn

NEAR_THE_LARGEST = 1e38  # numbers of fp32 end at 3.4e38


@dataclass(frozen=True)
class NestedScales:
    """The scales of a weight, quantized too: in blocks of 64 they take 0.127 instead of 0.5 bit per weight.

    Attributes:
        codes: (n_blocks,) uint8, indices into `dynamic8`.
        absmax: (ceil(n_blocks / 256),) fp32, the scales of the scales.
        offset: () fp32, the mean that was subtracted.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def dequantize(self) -> Tensor:
        """The fp32 scales, shape (n_blocks,)."""
        return (
            dequantize_blocks(self.codes, self.absmax, levels_of("dynamic8"), NESTED_BLOCKSIZE) + self.offset
        )


@dataclass(frozen=True, eq=False)
class QuantizedTensor(StandsIn):
    """A weight in 4 bits. Other code may use it like the tensor that it approximates: see `labkit.quant.stand_in`.

    Attributes:
        packed: (ceil(n / 2), 1) uint8; the first of two weights is in the high four bits.
        scales: fp32 absmax of shape (n_blocks,), or `NestedScales`.
        shape, dtype: of the weight that was quantized.
        codebook: name in `labkit.quant.codebooks.CODEBOOKS`.
        blocksize: weights that share a scale, one of `labkit.quant.config.BLOCKSIZES`.

    Raises:
        ValueError, TypeError: a field is not allowed, or does not fit the others.
    """

    packed: Tensor
    scales: Tensor | NestedScales
    shape: torch.Size
    dtype: torch.dtype
    codebook: str
    blocksize: int

    def __post_init__(self):
        scales: dict[str, Tensor] = {"scales": self.scales}
        if isinstance(self.scales, NestedScales):
            scales = {f"scales.{name}": tensor for name, tensor in vars(self.scales).items()}
        shape = check_fields(self.packed, scales, self.shape, self.dtype, self.codebook, self.blocksize)
        object.__setattr__(self, "shape", shape)

    @property
    def absmax(self) -> Tensor:
        """One fp32 scale per block, (n_blocks,); dequantized first if the scales are quantized."""
        return self.scales.dequantize() if isinstance(self.scales, NestedScales) else self.scales

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and its scales (the 16-entry codebook is shared, and not counted)."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def bits_per_param(self) -> float:
        return 8 * self.nbytes / self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The weight again: `levels[code] * absmax` in fp32, then rounded to `dtype`.

        Args:
            dtype: a floating dtype; the original's by default.
            out: contiguous tensor of `shape` to write to. Memory that was written before is at least twice as
                fast as new memory, so a loop over layers should keep one.

        Returns:
            `out`, or a new tensor of `shape`.

        Raises:
            TypeError: `dtype` is not a floating dtype.
            ValueError: `out` does not fit.
        """
        if out is not None:
            dtype = dtype or out.dtype
            if (
                out.shape != self.shape
                or out.dtype != dtype
                or out.device != self.packed.device
                or not out.is_contiguous()
                or out.is_neg()  # its numbers would be read with the other sign
            ):
                raise ValueError(
                    f"out is {tuple(out.shape)} {out.dtype} on {out.device}, contiguous={out.is_contiguous()}; this "
                    f"weight needs a contiguous tensor of shape {tuple(self.shape)} and dtype {dtype} on "
                    f"{self.packed.device}"
                )
        dtype, n = dtype or self.dtype, self.shape.numel()
        check_dtype("dtype", dtype)
        if not fast_for(self.packed):
            levels = levels_of(self.codebook)
            flat = dequantize_blocks(unpack(self.packed, n), self.absmax, levels, self.blocksize).to(dtype)
            return flat.view(self.shape) if out is None else out.copy_(flat.view(self.shape))
        values = operations.dequantize_4bit(self.for_kernels(), n, dtype, out)
        return values.view(self.shape) if out is None else out

    def multiply(self, x: Tensor) -> Tensor:
        """`x @ dequantize(x.dtype).T` for few rows x, (rows, in), without making the dequantized weight.

        Only where `labkit.quant.kernels.multiplies` says that there is a kernel; `multiply_4bit` there says
        what differs.

        Raises:
            ValueError: the kernel does not read x, because of its width, dtype or device.
        """
        here, dtypes = self.packed.device, multiplied_dtypes(self.packed.is_cuda)
        readable = x.device == here and x.dtype in dtypes and is_ordinary(x)
        if x.dim() != 2 or x.shape[1:] != self.shape[1:] or not readable:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} on {x.device}; this weight needs (rows, {self.shape[-1]}) "
                f"{wanted} on {here if here.type == 'cuda' else 'a CPU'}"
            )
        return operations.multiply_4bit(x, self.for_kernels(), self.shape[0])

    def for_kernels(self) -> PackedWeight:
        """This weight as the kernels take it."""
        scales, levels = self.scales, levels_of(self.codebook)
        if isinstance(scales, NestedScales):
            return PackedWeight(
                self.packed, scales.codes, levels, self.blocksize, scales.absmax, scales.offset
            )
        return PackedWeight(self.packed, scales, levels, self.blocksize)

    def error(self, weight: Tensor) -> dict[str, float]:
        """How far this is from `weight`: the errors of its values, and the relative error of the whole.

        Returns:
            `mean_abs`, `max_abs`, `mean_rel` (the mean of |error| / |weight| over weights that are not zero),
            and `relative_norm` (the norm of the error divided by that of the weight).
        """
        exact = weight.detach().float()
        error = (self.dequantize(torch.float32) - exact).abs()
        nonzero = exact != 0
        return {
            "mean_abs": error.mean().item(),
            "max_abs": error.max().item(),
            "mean_rel": (error[nonzero] / exact[nonzero].abs()).mean().item(),
            "relative_norm": (error.norm() / exact.norm()).item(),
        }

    def to(self, *args: Any, **kwargs: Any) -> "QuantizedTensor | Tensor":
        """The same weight on another device, packed as it is; in another dtype, dequantized. See `torch.Tensor.to`."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, self.dtype):
            return self.dequantize().to(*args, **kwargs)
        if device is None:
            return self
        scales = self.scales
        if isinstance(scales, NestedScales):
            scales = NestedScales(scales.codes.to(device), scales.absmax.to(device), scales.offset.to(device))
        else:
            scales = scales.to(device)
        return replace(self, packed=self.packed.to(device), scales=scales)


def quantize(
    weight: Tensor, config: QuantConfig | str | None = None, *others: Any, **settings: Any
) -> QuantizedTensor:
    """Quantize a weight to 4 bits in blocks.

    Args:
        weight: any shape, fp32, fp16 or bf16, finite.
        config: a `QuantConfig`, or the codebook of one. By default NF4 in blocks of 64 with double
            quantization.
        others, settings: without a `QuantConfig`, its other values, in their order (`quantize(w, "nf4", 64)`)
            or by name (`quantize(w, double_quant=False)`).

    Returns:
        A `QuantizedTensor`; `.dequantize()` gives the approximation of `weight`.

    Raises:
        TypeError: the weight is not a tensor of a supported dtype, or `QuantConfig` has no such setting.
        ValueError: the weight is empty or not finite, or the value of a setting is not allowed.

    Source: QLoRA, section 3.

    >>> q = quantize(torch.linspace(-1, 1, 4096).view(64, 64))
    >>> q.packed.shape, round(q.bits_per_param, 3)
    (torch.Size([2048, 1]), 4.141)
    """
    config = QuantConfig.of(config, *others, **settings)
    check_quantizable(weight)
    levels, blocksize = levels_of(config.codebook), config.blocksize
    flat = weight.detach().reshape(-1)
    if fast_for(flat):
        read = (
            flat if flat.is_cuda else flat.float()
        )  # without a copy in fp32, where the kernel can do without
        packed, absmax = operations.quantize_4bit(read.contiguous(), levels, blocksize)
    else:
        codes, absmax = quantize_blocks(flat.float(), levels, blocksize)
        packed = pack(codes, pad=int(codes_by_rank(levels)[7]))
    check_finite(absmax, weight)
    scales = quantize_scales(absmax, config.scale_rounding) if config.double_quant else absmax
    check_room(scales, absmax)
    return QuantizedTensor(packed, scales, weight.shape, weight.dtype, config.codebook, blocksize)


def check_quantizable(weight: Tensor) -> None:
    """Raise a `TypeError` or `ValueError` that says why, if `weight` cannot be quantized."""
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"a weight must be a float32, float16 or bfloat16 tensor, not {given}")
    if torch.nn.parameter.is_lazy(weight):
        raise ValueError("the weight has no shape yet; run the model once")
    if weight.layout != torch.strided or weight.is_nested:
        given = "nested" if weight.is_nested else str(weight.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"a weight must be a dense tensor, not a {given} one; give weight.to_dense()")
    if torch._C._functorch.is_batchedtensor(weight):
        raise TypeError(
            "a weight is quantized by itself, not within torch.func.vmap; loop over the weights instead"
        )
    if weight.numel() == 0:
        raise ValueError(f"the weight of shape {tuple(weight.shape)} is empty; there is nothing to quantize")


def check_finite(absmax: Tensor, weight: Tensor) -> None:
    """Raise a `ValueError` if a weight is NaN or infinite, as the absmax of its block then is too."""
    if absmax.device.type == "meta" or math.isfinite(absmax.max()):
        return
    bad = int((~torch.isfinite(weight)).sum())
    raise ValueError(
        f"{bad} of {weight.numel()} weights are NaN or infinite; their blocks have no scale. "
        "Find where they come from (a diverged run, an fp16 overflow) before quantizing."
    )


def check_room(scales: Tensor | NestedScales, absmax: Tensor) -> None:
    """Raise a `ValueError` if quantized scales, which may be larger than the scales, exceed fp32."""
    if not isinstance(scales, NestedScales) or absmax.is_meta or absmax.max() < NEAR_THE_LARGEST:
        return
    if not scales.dequantize().isfinite().all():
        raise ValueError(
            f"the largest weight, {absmax.max():.4g}, leaves float32 no room to round its scale up; quantize with "
            "double_quant=False, or divide the weight first"
        )


def quantize_scales(absmax: Tensor, rounding: str = "nearest") -> NestedScales:
    """Double quantization: fp32 scales (n_blocks,) to 8-bit codes, one scale per 256 of them, and their mean.

    Raises:
        ValueError: `rounding` is not one of `SCALE_ROUNDINGS`.
    """
    check_choice("scale_rounding", rounding, SCALE_ROUNDINGS)
    offset = absmax.mean()
    if not offset.is_meta and not math.isfinite(offset):  # the sum of finite scales exceeds fp32
        offset = absmax.double().mean().float()
    if rounding == "lookup":
        codes, nested = lookup_blocks(absmax - offset)
    elif quantizes_scales(absmax):
        codes, nested = operations.quantize_scales(absmax - offset)
    else:
        codes, nested = quantize_blocks(absmax - offset, levels_of("dynamic8"), NESTED_BLOCKSIZE)
    return NestedScales(codes, nested, offset)
