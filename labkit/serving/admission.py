"""What is asked of a PEFT folder before it becomes a version, and what is known of it then.

The registry is for one base. A folder that says another one is refused, and so is one whose tensors do not fit the
layers of the base, hold NaN, or are not those that were saved. A folder without `labkit.json` (PEFT's own) says nothing
that could be compared with the weights of the base: whoever publishes it has to state that it belongs to this one.

DoRA, modules that were trained in full and bases that were changed with their adapter are kept, and `alone` in the facts
says why they cannot share a base with other adapters in one batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit.formats.peft_config import check_settings, is_targeted
from labkit.formats.peft_folder import PREFIX, does_not_fit, read_folder
from labkit.formats.peft_tensors import STORED
from labkit.formats.provenance import check_saved, read_provenance
from labkit.lora.config import pattern_matches
from labkit.lora.fingerprint import PARTS, AdapterMismatch, differences, fingerprint, is_within
from labkit.models.walk import walk
from labkit.quant.layer_kinds import is_linear, widths

STATED = "stated by the publisher"


@dataclass(frozen=True)
class Base:
    """The base model of a registry.

    Attributes:
        name: as `labkit.models.load` takes it: "smollm2-135m".
        forms: a fingerprint for each form in which it is used: fp32, bf16, NF4. Only those of one kind can be compared.
        modules: (inputs, outputs) of its linear layers and embeddings, by name.
    """

    name: str
    forms: tuple[dict[str, str], ...]
    modules: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, name: str, *models: nn.Module) -> "Base":
        """The base called `name`, of which `models` are forms.

        Raises:
            ValueError: no models, or models whose layers differ.
        """
        if not models:
            raise ValueError(f"no model of the base {name!r} was given; give at least one form of it")
        forms = tuple(fingerprint(model) for model in models)
        if len({form["shapes"] for form in forms}) > 1:
            raise ValueError(f"the forms of {name!r} have other layers; give one model in several dtypes")
        modules = {
            layer.name: widths(layer.module)
            for layer in walk(models[0])
            if is_linear(layer.module) or isinstance(layer.module, nn.Embedding)
        }
        return cls(name, forms, modules)


@dataclass(frozen=True)
class Admitted:
    """What is known of a folder that may become a version.

    Attributes:
        base: the fingerprint of its base; None if it says none.
        data, config, metrics: as `labkit.json` has them.
        facts: what it is: variant, r, alpha, modules, parameters, bytes, dtype, alone, base_checked, versions.
    """

    base: dict[str, str] | None
    data: Any
    config: Any
    metrics: Any
    facts: dict[str, Any]


def examine(folder: Path, base: Base, trust_base: bool = False) -> Admitted:
    """Examine the PEFT folder `folder` as an adapter of `base`.

    Args:
        folder: as `labkit.save_adapter` or PEFT writes it.
        base: of the registry.
        trust_base: the publisher states that it was trained on this base, where the folder cannot say so.

    Raises:
        FileNotFoundError: no adapter there.
        AdapterMismatch: it is for another base, or for one that it does not say.
        ValueError: damaged, edited, a pickle file, with NaN, or of a kind that `labkit.load_adapter` does not read.
    """
    raw, tensors = read_folder(folder)
    provenance = read_provenance(folder)
    check_settings(raw, folder, recorded_start=provenance is not None and "start" in provenance)
    if problems := [*of_values(tensors), *of_layers(raw, tensors, base)]:
        raise does_not_fit(folder, problems)
    check_saved(raw, tensors, folder, provenance)
    checked = check_base(folder, base, provenance, trust_base)
    said = provenance or {}
    facts = facts_of(raw, tensors, said) | {"base_checked": checked, "versions": said.get("versions", {})}
    return Admitted(said.get("base"), said.get("data"), said.get("config"), said.get("metrics"), facts)


def of_values(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Numbers that no adapter has."""
    if not tensors:
        yield "it holds no tensors"
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            yield f"{key} holds NaN, infinity, or no numbers with a fraction"


def of_layers(raw: Mapping, tensors: Mapping[str, Tensor], base: Base) -> Iterator[str]:
    """Tensors that do not fit the layers of the base, layers without theirs, and tensors left over."""
    whole = tuple(raw.get("modules_to_save") or ())
    stored = {match[1].removeprefix(PREFIX) for key in tensors if (match := STORED.fullmatch(key))}
    means = is_targeted(dict(raw), stored)
    saved = [name for name in base.modules if whole and name.endswith(whole)]
    meant = {name for name in base.modules if means(name) and not is_within(name, saved)}
    yield from (f"{name}: no such layer in {base.name}" for name in sorted(stored - set(base.modules)))
    yield from (f"{name} is adapted by its settings, and has no tensors" for name in sorted(meant - stored))
    yield from (
        f"{name} has tensors, and is not adapted by its settings"
        for name in sorted(stored & set(base.modules) - meant)
    )
    for name in sorted(stored & meant):
        yield from of_factors(name, raw, tensors, base)
    for key in tensors:
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        of_base = (
            part == "weight" and name.removesuffix(".base_layer") in base.modules
        )  # as PEFT saves embeddings
        if STORED.fullmatch(key) is None and not of_base and not any(one in name for one in whole):
            yield f"{key} is neither a LoRA weight, nor of a module in modules_to_save"


def rank_of(raw: Mapping, name: str) -> int:
    """The rank that the settings give to a layer."""
    ranks = raw.get("rank_pattern") or {}
    return next((rank for key, rank in ranks.items() if pattern_matches(key, name)), raw["r"])


def of_factors(name: str, raw: Mapping, tensors: Mapping[str, Tensor], base: Base) -> Iterator[str]:
    """Tensors of one layer that are missing, left over, or of another shape."""
    (inputs, outputs), rank, layer = base.modules[name], rank_of(raw, name), f"{PREFIX}{name}."
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
    if f"{layer}lora_embedding_A" in tensors:
        shapes = {"lora_embedding_A": (rank, inputs), "lora_embedding_B": (outputs, rank)}
    elif raw.get("use_dora"):
        shapes["lora_magnitude_vector"] = (outputs,)
    for part, shape in shapes.items():
        if layer + part not in tensors:
            yield f"{layer}{part} is missing"
        elif (there := tuple(tensors[layer + part].shape)) != shape:
            yield f"{layer}{part} has shape {there}, not {shape} as in {base.name}"
    for key in tensors:
        if (
            (match := STORED.fullmatch(key))
            and match[1] + "." == layer
            and key.removeprefix(layer) not in shapes
        ):
            yield f"{key} is left over: its settings say another variant"


def check_base(folder: Path, base: Base, provenance: Mapping | None, trust_base: bool) -> str:
    """How it is known that the folder is for this base.

    Raises:
        AdapterMismatch: it is for another, or nobody says.
    """
    said = provenance or {}
    recorded = said.get("start", {}).get("origin") or said.get("base")
    here = form_like(recorded, base) if recorded and not said.get("replaces") else None
    if here is not None:
        differ = differences(recorded, here)
        if differ:
            hashes = ", ".join(f"{part} {recorded[part][:8]}… against {here[part][:8]}…" for part in differ)
            raise AdapterMismatch(
                f"the adapter in {folder} was trained on another base than {base.name}, which this registry is for "
                f"({hashes}). Publish it in a registry for its base"
            )
        if parts := compared(recorded, here):
            return f"by the fingerprint of its {' and '.join(parts)}"
    if trust_base:
        return STATED
    why = (
        "has no labkit.json, which would say its base"
        if not recorded
        else f"brings {', '.join(said['replaces'])} whole, so that its base is not that of the registry"
        if here is None
        else "was trained on a base in a form (dtype or quantization) that this registry does not know"
    )
    raise AdapterMismatch(
        f"the adapter in {folder} {why}: whether it is for {base.name} cannot be seen. If you know that it is, "
        "publish it with trust_base=True (--trust-base)"
    )


def form_like(recorded: Mapping[str, str], base: Base) -> dict[str, str]:
    """The form of the base that has most in common with a fingerprint, by the kinds of its parts."""
    return max(base.forms, key=lambda form: len(compared(recorded, form)))


def compared(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The parts of two fingerprints that are of one kind, so that their hashes can be compared."""
    return [p for p in PARTS if f"{p}_kind" in recorded and recorded[f"{p}_kind"] == here.get(f"{p}_kind")]


def facts_of(raw: Mapping, tensors: Mapping[str, Tensor], provenance: Mapping) -> dict[str, Any]:
    """What the adapter is."""
    layers = {match[1] for key in tensors if (match := STORED.fullmatch(key))}
    return {
        "variant": ("rs" if raw.get("use_rslora") else "") + ("dora" if raw.get("use_dora") else "lora"),
        "r": raw["r"],
        "rank": max([rank_of(raw, name.removeprefix(PREFIX)) for name in layers], default=raw["r"]),
        "alpha": raw["lora_alpha"],
        "modules": len(layers),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtype": "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        "alone": list(alone(raw, tensors, provenance)),
    }


def alone(raw: Mapping, tensors: Mapping[str, Tensor], provenance: Mapping) -> Iterator[str]:
    """Why the adapter cannot share a base with others in one batch."""
    if raw.get("use_dora"):
        yield "DoRA scales each row of W + sBA by a norm of its own: it has no product that can be added to a shared base"
    if "start" in provenance or raw.get("init_lora_weights") in ("pissa", "olora", "loftq"):
        yield f"it is a difference to a base that was changed with it (init={raw.get('init_lora_weights')})"
    whole = sorted(
        {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if not STORED.fullmatch(key)}
    )
    if whole or raw.get("modules_to_save"):
        names = ", ".join(whole or raw["modules_to_save"])
        yield f"it brings whole modules ({names}) in place of the base's"
