"""Four-bit weights in the format of bitsandbytes: the keys and bytes that its `Linear4bit` saves.

A layer's `state_dict`, and so a checkpoint that transformers saved with `load_in_4bit`, holds for each weight

    weight                                  (n / 2, 1) uint8        our `packed`
    weight.absmax                           (n_blocks,) fp32        or uint8 codes under double quantization
    weight.quant_map                        (16,) fp32              the codebook
    weight.nested_absmax                    (n_blocks / 256,) fp32  only under double quantization, as is
    weight.nested_quant_map                 (256,) fp32             the codebook of the scales
    weight.quant_state.bitsandbytes__nf4    uint8                   the letters of a JSON object with the
                                                                    rest: shape, dtype, blocksize, …

Because the codes and scales agree bit for bit, nothing is computed here: tensors are renamed.

Agrees with: bitsandbytes `functional.py`, `QuantState.as_dict` and `from_dict`.
"""

import json
import math

import torch
from torch import Tensor

from labkit.checks import is_number, is_same, is_whole
from labkit.files import reading
from labkit.quant.blockwise import NESTED_BLOCKSIZE
from labkit.quant.codebooks import codebook as levels_of
from labkit.quant.config import BLOCKSIZES
from labkit.quant.tensor import NestedScales, QuantizedTensor

QUANT_TYPES = ("nf4", "fp4")  # the codebooks that bitsandbytes can read
DTYPES = ("float32", "bfloat16", "float16")


def to_bitsandbytes(q: QuantizedTensor, prefix: str = "weight") -> dict[str, Tensor]:
    """The entries of a bitsandbytes `state_dict` for one weight.

    Args:
        q: a weight in "nf4" or "fp4".
        prefix: the weight's name, for instance "model.layers.0.self_attn.q_proj.weight".

    Returns:
        Keys and tensors as `Linear4bit.state_dict()` has them, byte for byte.

    Raises:
        ValueError: the codebook is one that bitsandbytes does not have.
    """
    if q.codebook not in QUANT_TYPES:
        raise ValueError(f"bitsandbytes has no codebook {q.codebook!r}; it reads {QUANT_TYPES}")
    rest = {
        "quant_type": q.codebook,
        "blocksize": q.blocksize,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    entries = {
        "": q.packed,
        ".absmax": q.absmax,
        ".quant_map": levels_of(q.codebook).to(q.packed.device, copy=True),
    }
    if isinstance(q.scales, NestedScales):
        entries[".absmax"] = q.scales.codes
        entries[".nested_absmax"] = q.scales.absmax
        entries[".nested_quant_map"] = levels_of("dynamic8").to(q.packed.device, copy=True)
        rest["nested_blocksize"] = NESTED_BLOCKSIZE
        rest["nested_dtype"] = "float32"
        rest["nested_offset"] = q.scales.offset.item()
    letters = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    entries[f".quant_state.bitsandbytes__{q.codebook}"] = letters
    return {prefix + key: value for key, value in entries.items()}


def from_bitsandbytes(state_dict: dict[str, Tensor], prefix: str = "weight") -> QuantizedTensor:
    """Read one weight from a bitsandbytes `state_dict`.

    Args:
        state_dict: of a layer or a whole model; keys that do not begin with `prefix` are ignored.
        prefix: the weight's name.

    Returns:
        A `QuantizedTensor` that shares memory with `state_dict`.

    Raises:
        KeyError: there is no 4-bit weight of this name, or a part of it is missing.
        ValueError: it was quantized with settings or codebooks that `labkit` does not have, or is damaged.
    """
    mark = ".quant_state.bitsandbytes__"
    states = [key for key in state_dict if key.startswith(prefix + mark)]
    if len(states) != 1 or prefix not in state_dict:
        known = sorted(key.partition(mark)[0] for key in state_dict if mark in key)
        raise KeyError(
            f"no 4-bit weight {prefix!r} in this state_dict. "
            + (
                f"It holds: {', '.join(known[:5])}{', …' if len(known) > 5 else ''}"
                if known
                else "It holds none at all"
            )
        )
    rest = read_description(state_dict[states[0]], prefix)
    name, blocksize, nested = rest["quant_type"], rest["blocksize"], "nested_blocksize" in rest
    parts = ("quant_map", "absmax", *(("nested_quant_map", "nested_absmax") if nested else ()))
    missing = [part for part in parts if f"{prefix}.{part}" not in state_dict]
    if missing:
        raise KeyError(
            f"the 4-bit weight {prefix!r} lacks {', '.join(f'{prefix}.{part}' for part in missing)}, "
            "without which its values are lost; was the checkpoint cut short, or filtered by name?"
        )
    check_map(state_dict[f"{prefix}.quant_map"], name, prefix)
    scales = state_dict[f"{prefix}.absmax"]
    if scales.is_floating_point() == nested:
        raise ValueError(
            f"{prefix}.absmax is {scales.dtype}, but its description is of a weight "
            f"{'with' if nested else 'without'} double quantization; the two do not belong together"
        )
    check_scales(state_dict[f"{prefix}.{'nested_absmax' if nested else 'absmax'}"], prefix)
    if nested:
        check_map(state_dict[f"{prefix}.nested_quant_map"], "dynamic8", prefix)
        offset = torch.tensor(rest["nested_offset"], dtype=torch.float32, device=scales.device)
        scales = NestedScales(scales, state_dict[f"{prefix}.nested_absmax"].float(), offset)
    else:
        scales = scales.float()
    # saved as uint8, or as another dtype of the same bytes
    packed = state_dict[prefix].view(torch.uint8).view(-1, 1)
    return QuantizedTensor(
        packed, scales, torch.Size(rest["shape"]), getattr(torch, rest["dtype"]), name, blocksize
    )


def read_description(letters: Tensor, prefix: str) -> dict:
    """What the JSON object beside a weight says of it.

    Args:
        letters: (n,) uint8, the letters of the object.
        prefix: the weight's name.

    Raises:
        ValueError: no such object, or with values that there are not here.
    """
    if letters.dtype != torch.uint8 or letters.dim() != 1:
        raise ValueError(f"the description of {prefix} is {letters.dtype}, not the letters of JSON")
    rest = reading.parse_json(f"the description of {prefix}", bytes(letters.tolist()))
    if not isinstance(rest, dict):
        raise ValueError(f"the description of {prefix} is no JSON object")
    name, blocksize = rest.get("quant_type"), rest.get("blocksize")
    if name not in QUANT_TYPES or not is_whole(blocksize) or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"{prefix}: quant_type={name!r}, blocksize={blocksize!r}; known are {QUANT_TYPES}, {BLOCKSIZES}"
        )
    shape, dtype = rest.get("shape"), rest.get("dtype")
    if dtype not in DTYPES or not isinstance(shape, list) or not shape or not all(map(is_whole, shape)):
        raise ValueError(
            f"{prefix}: dtype={dtype!r}, shape={shape!r}; known are {DTYPES} and sizes of at least 1"
        )
    if "nested_blocksize" in rest and not (
        is_same(rest["nested_blocksize"], NESTED_BLOCKSIZE)
        and is_number(rest.get("nested_offset"))
        and math.isfinite(rest["nested_offset"])
    ):
        raise ValueError(
            f"{prefix}: nested_blocksize={rest['nested_blocksize']!r}, nested_offset={rest.get('nested_offset')!r}; "
            f"only blocks of {NESTED_BLOCKSIZE} with a finite offset are known"
        )
    return rest


def check_scales(scales: Tensor, prefix: str) -> None:
    """Refuse a weight whose scales, largest absolute values, are not finite or below zero."""
    if not scales.is_floating_point() or not (scales.isfinite() & (scales >= 0)).all():
        raise ValueError(f"{prefix}: its scales hold NaN, infinity or numbers below 0; the file is damaged")


def check_map(levels: Tensor, name: str, prefix: str) -> None:
    """Refuse a weight with other levels than `labkit.quant.codebooks` has, to within the rounding of fp32."""
    ours = levels_of(name)
    error = (levels.float().cpu() - ours).abs().max().item() if levels.shape == ours.shape else math.inf
    if not error <= 1e-6:  # NaN is no codebook either
        raise ValueError(
            f"{prefix}: its {name} codebook differs from ours by {error:.2g}; its values would be wrong"
        )
