"""What a 4-bit layer's state says about itself, so that its bytes are read as they were written.

The same bytes are other weights under another codebook or block size. So beside its tensors a `state_dict` holds a
description, as PyTorch's "extra state": a JSON object whose letters are a uint8 tensor, since a safetensors file
holds only tensors. bitsandbytes does the same (`quant_state`).
"""

import json

import torch
from torch import Tensor

from labkit.quant.tensor import NestedScales, QuantizedTensor

DESCRIPTION = "_extra_state"  # PyTorch's name for it in a state_dict
FIELDS = ("codebook", "blocksize", "double_quant", "shape", "dtype")


def tensors_by_name(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight, by their names as buffers of a layer."""
    scales = weight.scales
    if isinstance(scales, NestedScales):
        return {
            "packed": weight.packed,
            "absmax_codes": scales.codes,
            "absmax_absmax": scales.absmax,
            "absmax_offset": scales.offset,
        }
    return {"packed": weight.packed, "absmax": scales}


def describe(weight: QuantizedTensor) -> Tensor:
    """What is needed to read the bytes of `weight`, as the letters of a JSON object, uint8.

    >>> from labkit.quant.tensor import quantize
    >>> bytes(describe(quantize(torch.randn(64, 32))).tolist()).decode()
    '{"codebook": "nf4", "blocksize": 64, "double_quant": true, "shape": [64, 32], "dtype": "float32"}'
    """
    fields = {
        "codebook": weight.codebook,
        "blocksize": weight.blocksize,
        "double_quant": isinstance(weight.scales, NestedScales),
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8, device="cpu")


def read_weight(state: dict[str, Tensor], prefix: str, shape: torch.Size) -> QuantizedTensor | None:
    """The weight that a `state_dict` holds under `prefix`, by its description.

    Args:
        state: of a layer or a whole model.
        prefix: of the layer's keys, such as "model.layers.0.mlp.up_proj.".
        shape: what the weight's must be.

    Returns:
        The weight, which shares memory with `state`; None if it has no description that can be read: it was saved
        by labkit 0.1.0, or is on the meta device.

    Raises:
        ValueError: the description is damaged, of another shape, or does not fit the tensors, or a scale is not finite;
            the message says which.
    """
    description = state.get(prefix + DESCRIPTION)
    if not isinstance(description, Tensor) or type(description) is not Tensor or description.is_meta:
        return None
    try:
        fields = json.loads(bytes(description.tolist()))
        codebook, blocksize, double_quant, described, dtype = (fields[name] for name in FIELDS)
        dtype = getattr(torch, dtype)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise ValueError(
            f"{prefix}{DESCRIPTION} is damaged, so the bytes of this weight cannot be read; save the model again"
        ) from None
    if described != list(shape):
        raise ValueError(
            f"{prefix}packed is a weight of shape {tuple(described)}; this layer's is {tuple(shape)}"
        )
    names = ("absmax_codes", "absmax_absmax", "absmax_offset") if double_quant else ("absmax",)
    missing = [prefix + name for name in ("packed", *names) if prefix + name not in state]
    if missing:
        raise ValueError(f"{', '.join(missing)} are missing, without which this weight cannot be read")
    first, *rest = (state[prefix + name] for name in names)
    if any(
        isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in (first, *rest)
    ):
        raise ValueError(
            f"the scales of {prefix}packed hold NaN or infinity; the file is damaged, or a run diverged"
        )
    scales = NestedScales(first, *rest) if double_quant else first
    try:
        return QuantizedTensor(state[prefix + "packed"], scales, shape, dtype, codebook, blocksize)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{prefix}packed: {error}") from None
