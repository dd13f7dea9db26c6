"""Which base model is this? A fingerprint to keep beside an adapter.

An adapter is a difference. On another base, even a later version of the same one, it is noise that loads without an error. So
hashes of the base's weights go with the adapter, and are compared before it is loaded.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.lora import adapter_in_place, lora_layers
from labkit.models.surgery import replace_module
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor

PROVENANCE = "labkit.json"
VERSIONS = ("labkit", "torch", "transformers", "safetensors")


class AdapterMismatch(ValueError):
    """The adapter does not belong to this model; the message says what differs."""


@contextmanager
def base_in_place(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the base's own modules stand where adapters were; a merged weight stays merged."""
    adapter = adapter_in_place(model)
    kept = adapter.base_modules() if adapter is not None and adapter.originals is not None else {}
    for path, module in kept.items():
        replace_module(model, path, module)
    try:
        yield model
    finally:
        for path in kept:
            replace_module(model, path, adapter.modules[path])


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


def versions() -> dict[str, str]:
    """The versions of the packages that an adapter was made with."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def read_provenance(path: Path) -> dict | None:
    """What `labkit.json` records; None if there is none."""
    try:
        provenance = json.loads((path / PROVENANCE).read_text())
        provenance["base"]["shapes"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path / PROVENANCE} is damaged; delete it to load the adapter without checking its base"
        ) from None
    return provenance


def check_base(model: nn.Module, path: Path, provenance: dict | None) -> None:
    """Compare the recorded fingerprint of the base with that of `model`; a folder without one passes."""
    if provenance is None:
        return
    recorded, mine = provenance["base"], fingerprint(model)
    differs = differences(recorded, mine)
    if differs == ["shapes"]:
        raise AdapterMismatch(
            f"the adapter in {path} was made for a model of other layers or sizes than this {mine['class']}"
        )
    if differs:
        hashes = ", ".join(f"{part} {recorded[part][:8]}… against {mine[part][:8]}… here" for part in differs)
        raise AdapterMismatch(
            f"the adapter in {path} was trained on a base of the same shape but with other weights (fingerprints: {hashes}). "
            f"On this base it would be noise. Load the base that it was trained on, or delete {PROVENANCE} to insist"
        )
