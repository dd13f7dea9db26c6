"""An adapter as it is served: the factors of its layers, read from a PEFT folder, and what identifies it.

It is no part of a model: tensors by the names of layers, which a layer looks up when a row asks for them. So hundreds
of adapters can be there at once, and one comes or goes without touching the others.

What can share a base with others is a sum beside the base's output: plain LoRA and rsLoRA, of any ranks, scalings and
layers. What changes the base itself cannot, and is refused with the reason: see `why_not_shared`.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from labkit.formats.peft_config import check_settings, from_peft
from labkit.formats.peft_folder import read_folder
from labkit.formats.peft_settings import canonical, hash_settings, shown
from labkit.formats.peft_tensors import check_adapter, expected_tensors, tensor_names
from labkit.formats.provenance import check_base, check_saved, hash_named, read_provenance
from labkit.lora.config import LoRAConfig
from labkit.lora.mounting import standing
from labkit.models.walk import unwrap
from labkit.serving.segments import Factors

ALIGNMENT = 64  # bytes, a line of the caches


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        name: what rows call it.
        version: a hash of its tensors and of its settings. Two adapters of one name and other weights have two.
        base: the hash of the fingerprint of its base.
        config: ranks, scalings and layers.
        factors: by the own name of a layer.
    """

    name: str
    version: str
    base: str
    config: LoRAConfig = field(repr=False)
    factors: Mapping[str, Factors] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(A.nbytes + B.nbytes for A, B, _ in self.factors.values())


def identity_of(fingerprint: Mapping[str, str]) -> str:
    """One hash of the fingerprint of a base."""
    return sha256(canonical(dict(fingerprint))).hexdigest()


def why_not_shared(raw: Mapping[str, object], has_start: bool) -> str | None:
    """Why an adapter cannot be one of several in a batch, by its `adapter_config.json`; None if it can.

    Args:
        raw: the configuration.
        has_start: does its `labkit.json` say that its base was made together with it?
    """
    kind, start = raw.get("peft_type"), raw.get("init_lora_weights")
    if kind != "LORA":
        return (
            f"peft_type={shown(kind)}: only LoRA adds to the output of a layer row by row; a soft prompt or a prefix "
            "changes the length of a row, and other methods what a layer computes. Serve it from a model of its own"
        )
    if raw.get("use_dora"):
        return (
            "it is DoRA, which divides by the norms of W + s B A: a factor on the base's own output, not a sum beside "
            "it. Merge it into a copy of the base (labkit.formats.save_merged)"
        )
    if raw.get("modules_to_save"):
        return (
            f"it brings modules of its own ({shown(raw['modules_to_save'])}), and the base has room for one of each. "
            "Serve it from a model of its own"
        )
    if has_start or start in ("pissa", "olora"):
        return (
            f"init={shown(start)} changed the base, which others share. Save it with plain=True, as LoRA on the "
            "original base"
        )
    return None


def read_adapter(model: nn.Module, path: str | Path, name: str, base: dict[str, str]) -> LoadedAdapter:
    """The adapter in the PEFT folder `path`, for `model`, which stays as it is.

    Args:
        model: the base; other adapters may be in a bank on it.
        path: folder written by `labkit.save_adapter` or by PEFT.
        name: what rows are to call it.
        base: the fingerprint of the base, which takes long to compute.

    Raises:
        FileNotFoundError: no adapter there.
        labkit.lora.AdapterMismatch: made for another base, or tensors missing, left over or of another shape.
        ValueError: it cannot share a base, or is damaged, edited, a pickle file or holds NaN.
    """
    path = Path(path)
    raw, tensors = read_folder(path)
    provenance = read_provenance(path)
    reason = why_not_shared(raw, provenance is not None and "start" in provenance)
    if reason is not None:
        raise ValueError(f"the adapter in {path} cannot share a base with others: {reason}")
    check_settings(raw, path)
    check_base(model, path, provenance, base)
    config, names = from_peft(model, raw, tensors, path)
    check_adapter(model, config, names, tensors, path)
    check_saved(raw, tensors, path, provenance)
    factors = factors_of(model, config, names, tensors)
    version = sha256(f"{hash_named(tensors)} {hash_settings(raw)}".encode()).hexdigest()
    return LoadedAdapter(name, version, identity_of(base), config, factors)


def factors_of(
    model: nn.Module, config: LoRAConfig, layers: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Factors]:
    """What a folder holds for each layer, copied out of the file to where the layer computes.

    Columns of B lie one after another: a correction is a sum of them.
    """
    wanted, sides = expected_tensors(model, config, layers), {}
    shapes: dict[Hashable, tuple[tuple[int, ...], torch.dtype, torch.device]] = {}
    for layer in layers:
        base = unwrap(standing(model, layer))
        names = tensor_names(layer, base)
        A, B = tensors[names["lora_A"]], tensors[names["lora_B"]]
        dtype, device = wanted[names["lora_A"]].dtype, next(iter(base.state_dict().values())).device
        for side, values in (("A", A), ("B", B.T)):
            sides[layer, side], shapes[layer, side] = values, (tuple(values.shape), dtype, device)
    rooms = make_room(shapes)
    for key, values in sides.items():
        rooms[key].copy_(values)
    return {
        layer: Factors(rooms[layer, "A"], rooms[layer, "B"].T, config.for_layer(layer).scaling)
        for layer in layers
    }


def make_room(shapes: Mapping[Hashable, tuple[tuple[int, ...], torch.dtype, torch.device]]) -> dict:
    """Tensors of these shapes, dtypes and devices, without values; those of a device in one piece of memory.

    Hundreds of small pieces lie on thousands of small pages. For one large piece numpy asks the system for huge pages,
    and 16 adapters of a 135M model are read in 11 ms instead of 14.
    """
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype, _) in shapes.items()}
    ends: Counter[torch.device] = Counter()
    starts = {}
    for key, (_, _, device) in shapes.items():
        starts[key] = ends[device]
        ends[device] += -(-sizes[key] // ALIGNMENT) * ALIGNMENT
    pieces = {
        device: torch.from_numpy(np.empty(size, np.uint8))
        if device.type == "cpu"
        else torch.empty(size, dtype=torch.uint8, device=device)
        for device, size in ends.items()
    }
    return {
        key: pieces[device][starts[key] : starts[key] + sizes[key]].view(dtype).view(shape)
        for key, (shape, dtype, device) in shapes.items()
    }
