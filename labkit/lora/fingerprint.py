"""Which base model is this? A fingerprint to keep beside an adapter.

An adapter is a difference. On another base, even a later version of the same one, it is noise that loads
without an error. So hashes of the base's weights go with the adapter, and are compared before it is loaded.

The hashes are of values, not of how the model is put together: tied embeddings have the fingerprint of untied
ones that are equal, and whatever stands around the model or its layers (`labkit.models.walk`) does not count.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from labkit.lora.adapters import base_only
from labkit.lora.merging import unmerged
from labkit.lora.mounting import mounted_adapter
from labkit.models.walk import Layer, unwrap, walk
from labkit.quant.codebooks import CODEBOOKS
from labkit.quant.config import BLOCKSIZES
from labkit.quant.linear import QuantLinear

PARTS = ("linears", "rest", "biases")  # each with its kind, in `PART_kind`
DTYPES = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.uint8")


class AdapterMismatch(ValueError):
    """The adapter does not belong to this model; the message says what differs."""


def fingerprint(model: nn.Module, replaced: Sequence[str] = ()) -> dict[str, str]:
    """Hashes that identify a base model.

    The same base in 4 bits and in 32, or in bf16 and in fp32, has other bytes. `linears_kind` and its like say
    which they are, and only hashes of the same kind are compared. Adapters, merged or not, do not count; a
    4-bit base that was made together with its adapter is the base.

    Args:
        model: a base model, with or without adapters.
        replaced: own names of modules that are left out, because an adapter brings its own (`modules_to_save`).

    Returns:
        `class`, `shapes` (of the linear layers), and for the linear weights (`linears`), the biases of linear
        layers (`biases`, if there are any) and all others (`rest`) a hash and its kind.
    """
    adapter = mounted_adapter(model)
    with unmerged(model), base_only(model) if adapter is None or adapter.keeps_base else nullcontext():
        return hash_base(model, replaced)


def hash_base(model: nn.Module, replaced: Sequence[str] = ()) -> dict[str, str]:
    """`fingerprint` of a model as it stands, parameters of adapters left out."""
    layers = [layer for layer in walk(model) if not is_within(layer.name, replaced)]
    linears = {layer.name: layer.module for layer in layers if is_counted_linear(layer.module)}
    linears = dict(sorted(linears.items()))
    biases = {name: m.bias for name, m in linears.items() if m.bias is not None}
    weights = [m.packed if isinstance(m, QuantLinear) else m.weight for m in linears.values()]
    rest = other_parameters(layers, (*weights, *biases.values()))
    shapes = "\n".join(f"{name}:{m.out_features}x{m.in_features}" for name, m in linears.items())
    made = {
        "class": type(unwrap(model)).__name__,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "linears": hash_tensors(weights),
        "linears_kind": "+".join(sorted({kind_of_weight(m) for m in linears.values()})),
        "rest": hash_tensors(rest),
        "rest_kind": "+".join(sorted({str(p.dtype) for p in rest})),
    }
    if biases:
        made["biases"] = hash_tensors(biases.values())
        made["biases_kind"] = "+".join(sorted({str(b.dtype) for b in biases.values()}))
    return made


def is_within(name: str, parents: Iterable[str]) -> bool:
    """Is the module `name` one of `parents`, own names, or inside one?"""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def is_counted_linear(module: nn.Module) -> bool:
    """Does its weight count among `linears`? (GPT-2's Conv1D counts among `rest`.)"""
    return isinstance(module, (nn.Linear, QuantLinear))


def kind_of_weight(module: nn.Module) -> str:
    """How the weight of a linear layer is stored: its dtype, or "nf4/64/double"."""
    if isinstance(module, QuantLinear):
        return f"{module.codebook}/{module.blocksize}{'/double' if module.double_quant else ''}"
    return str(module.weight.dtype)


def other_parameters(layers: Iterable[Layer], of_linears: Iterable[Tensor]) -> list[Tensor]:
    """The parameters of layers that are not linear, by name; a matrix that is there twice, or is a linear
    layer's, counts once: the two are tied, or could be."""
    seen: dict[tuple, list[Tensor]] = {}
    for tensor in of_linears:
        seen.setdefault(place_and_size(tensor), []).append(tensor)
    found: dict[str, Tensor] = {}
    for layer in layers:
        if is_counted_linear(layer.module):
            continue
        for part, parameter in layer.module.named_parameters(recurse=False):
            alike = seen.setdefault(place_and_size(parameter), [])
            if not any(parameter is one or (parameter.dim() > 1 and same(parameter, one)) for one in alike):
                found[f"{layer.name}.{part}".lstrip(".")] = parameter
                alike.append(parameter)
    return [parameter for _, parameter in sorted(found.items())]


def place_and_size(tensor: Tensor) -> tuple:
    return tensor.device, tensor.dtype, tensor.shape


def same(one: Tensor, other: Tensor) -> bool:
    """Are two tensors of one shape and dtype equal? A look at the first row spares most of the work."""
    return torch.equal(one[:1], other[:1]) and torch.equal(one, other)


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """The sha256 of the bytes of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        update(digest, tensor)
    return digest.hexdigest()


def update(digest, tensor: Tensor) -> None:
    """Add the bytes of `tensor` to a hash."""
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def check_recorded(recorded: object) -> None:
    """Raise a `ValueError` unless `recorded` is a fingerprint, with `biases` or without.

    A kind that there is not would never be compared, and the check of the base be none.
    """
    keys = {"class", "shapes"} | {f"{part}{end}" for part in PARTS for end in ("", "_kind")}
    before = keys - {"biases", "biases_kind"}
    if not isinstance(recorded, dict) or set(recorded) not in (keys, before):
        raise ValueError("its fingerprint of the base is not complete")
    if not all(isinstance(value, str) for value in recorded.values()):
        raise ValueError("its fingerprint of the base is not of words")
    for part in PARTS:
        kinds = recorded.get(f"{part}_kind", "")
        if not all(is_kind(kind) for kind in kinds.split("+") if kinds):
            raise ValueError(f"{part}_kind={kinds!r} is not one that there is")


def is_kind(kind: str) -> bool:
    """Is it a dtype of weights, or settings of 4-bit ones, such as "nf4/64/double"?"""
    codebook, *rest = kind.removesuffix("/double").split("/")
    return kind in DTYPES or (codebook in CODEBOOKS and rest in [[str(size)] for size in BLOCKSIZES])


def differences(recorded: dict, here: dict, strict: bool = False) -> list[str]:
    """Which parts of two fingerprints say that the bases are not the same; "shapes" alone if those differ.

    Args:
        recorded: with an adapter. Folders of version 0.1.0 have no `biases`, which are then not compared.
        here: of the model.
        strict: another kind is another base too.
    """
    if recorded["shapes"] != here["shapes"]:
        return ["shapes"]
    known = [part for part in PARTS if part in recorded and part in here]
    other_kind = {part for part in known if recorded[f"{part}_kind"] != here[f"{part}_kind"]}
    return [
        part
        for part in known
        if (part in other_kind and strict) or (part not in other_kind and recorded[part] != here[part])
    ]
