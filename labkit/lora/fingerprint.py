"""Which base model is this? A fingerprint to keep beside an adapter.

An adapter is a difference. On another base, even a later version of the same one, it is noise that loads without an error. So
hashes of the base's weights go with the adapter, and are compared before it is loaded.
"""

import hashlib

import torch
from torch import Tensor, nn

from labkit.lora.inject import base_in_place, lora_layers
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor


class AdapterMismatch(ValueError):
    """The adapter does not belong to this model; the message says what differs."""


def fingerprint(model: nn.Module) -> dict:
    """Hashes that tell base models apart: of the linear weights (`linears`), and of all others (`rest`).

    The same base in 4 bits and in 32, or in bf16 and in fp32, has other bytes. `linears_kind` and `rest_kind` say which
    they are, and only hashes of the same kind are compared. Adapters, merged or not, do not count.
    """
    originals: dict[int, Tensor] = {}  # what a merge has put aside, by the id of what is there instead
    for layer in lora_layers(model).values():
        if layer.merged_from is not None:
            quantized = isinstance(layer.merged_from, QuantizedTensor)
            there = layer.base.packed if quantized else layer.base.weight
            originals[id(there)] = layer.merged_from.packed if quantized else layer.merged_from
    with base_in_place(model):
        return hash_base(model, originals)


def hash_base(model: nn.Module, originals: dict[int, Tensor]) -> dict:
    linears = {
        name.removesuffix(".base"): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLinear))
    }
    hash_linears, hash_rest, kinds = hashlib.sha256(), hashlib.sha256(), set()
    for _, module in sorted(linears.items()):
        if isinstance(module, QuantLinear):
            kinds.add(f"{module.codebook}/{module.blocksize}{'/double' if module.double_quant else ''}")
            weight = module.packed
        else:
            kinds.add(str(module.weight.dtype))
            weight = module.weight
        update(hash_linears, originals.get(id(weight), weight))
    counted = {id(p) for module in linears.values() for p in module.parameters(recurse=False)}
    rest = {n: p for n, p in model.named_parameters() if id(p) not in counted and ".lora_" not in n}
    for _, parameter in sorted(rest.items()):
        update(hash_rest, originals.get(id(parameter), parameter))
    shapes = "\n".join(f"{name}:{m.out_features}x{m.in_features}" for name, m in sorted(linears.items()))
    return {
        "class": type(model).__name__,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "linears": hash_linears.hexdigest(),
        "linears_kind": "+".join(sorted(kinds)),
        "rest": hash_rest.hexdigest(),
        "rest_kind": "+".join(sorted({str(p.dtype) for p in rest.values()})),
    }


def update(digest, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def differences(recorded: dict, here: dict) -> list[str]:
    """Which parts of two fingerprints say that the bases are not the same; "shapes" alone if those differ."""
    if recorded["shapes"] != here["shapes"]:
        return ["shapes"]
    return [
        part
        for part in ("linears", "rest")
        if recorded[f"{part}_kind"] == here[f"{part}_kind"] and recorded[part] != here[part]
    ]
