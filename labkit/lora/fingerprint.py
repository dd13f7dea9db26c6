"""Which base model is this? A fingerprint to keep beside an adapter.

An adapter is a difference. On another base, even a later version of the same one, it is noise that loads
without an error. So hashes of the base's weights go with the adapter, and are compared before it is loaded.
"""

import hashlib
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from labkit.lora.adapters import base_only
from labkit.lora.merging import unmerged
from labkit.lora.mounting import mounted_adapter
from labkit.quant.linear import QuantLinear


class AdapterMismatch(ValueError):
    """The adapter does not belong to this model; the message says what differs."""


def fingerprint(model: nn.Module) -> dict:
    """Hashes that identify a base model: of its linear weights (`linears`), and of all others (`rest`).

    The same base in 4 bits and in 32, or in bf16 and in fp32, has other bytes. `linears_kind` and `rest_kind`
    say which they are, and only hashes of the same kind are compared. Adapters, merged or not, do not count;
    a 4-bit base that was made together with its adapter is the base.
    """
    adapter = mounted_adapter(model)
    with unmerged(model), base_only(model) if adapter is None or adapter.keeps_base else nullcontext():
        return hash_base(model)


def hash_base(model: nn.Module) -> dict:
    """`fingerprint` of a model as it stands, parameters of adapters left out."""
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
        update(hash_linears, weight)
    counted = {id(p) for module in linears.values() for p in module.parameters(recurse=False)}
    rest = {n: p for n, p in model.named_parameters() if id(p) not in counted and ".lora_" not in n}
    for _, parameter in sorted(rest.items()):
        update(hash_rest, parameter)
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
    """Add the bytes of `tensor` to a hash."""
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def differences(recorded: dict, here: dict) -> list[str]:
    """Which parts of two fingerprints say that the bases are not the same; "shapes" alone if those differ."""
    if recorded["shapes"] != here["shapes"]:
        return ["shapes"]
    return [
        part
        for part in ("linears", "rest")
        if recorded[f"{part}_kind"] == here[f"{part}_kind"] and recorded[part] != here[part]
    ]
