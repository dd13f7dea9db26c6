"""Adapters on disk, in the format of Hugging Face PEFT, so that every production stack can load what is trained here.

A folder with `adapter_config.json` and `adapter_model.safetensors`, whose tensors are, after the prefix `base_model.model.`,

    <module>.lora_A.weight (r, in)        <module>.lora_B.weight (out, r)
    <module>.lora_magnitude_vector (out,)                                          DoRA; no ".weight" here
    <module>.lora_embedding_A (r, vocabulary)    <module>.lora_embedding_B (width, r)
    <module>.<parameter>                                                           a module that trained in full

Beside them this writes `labkit.json`, which PEFT ignores: where the adapter comes from, and a fingerprint of its base. An adapter
is a *difference*; on another base it is noise, silently. So loading compares the fingerprints.

PiSSA is a difference to a base that it changed itself. It is saved as plain LoRA of rank 2r on the original base, which any stack
can serve, or (plain=False) as PEFT saves it: the loader then has to repeat the decomposition of the base.

Loading never guesses: a tensor too many, one too few, or one of another shape is an error that names it. That is how
other loaders come to act as the identity, with an adapter of which no key matched.

Agrees with: PEFT `utils/save_and_load.py` (a folder from here loads there, and the other way round).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.formats.peft_folder import (
    PREFIX,
    check_tensors,
    config_from_peft,
    layer_tensors,
    peft_config,
    read_folder,
    write_folder,
)
from labkit.formats.provenance import check_base, read_provenance, versions
from labkit.lora.adapters import adapter_configs, base_only, check_new
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch, differences, fingerprint
from labkit.lora.inject import lora_layers, make_adapter
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import Adapter, attach, mounted_adapter
from labkit.lora.plain import plain_factors
from labkit.lora.qlora import add_qlora
from labkit.quant.linear import QuantLinear


def save_adapter(
    model: nn.Module,
    path: str | Path,
    plain: bool = True,
    data: object = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save the adapter of `model` that is in place as a PEFT folder.

    The folder is written under a temporary name and renamed, so that an old adapter at `path` is replaced whole or not
    at all.

    Args:
        model: with adapters (`add_lora`), merged or not.
        path: folder to write; its parent is made if need be.
        plain: write PiSSA and OLoRA as LoRA of rank 2r on the original base. False: as a difference to the base that they changed,
            which loading makes again. LoftQ, whose base nobody else has, needs False.
        data: what it was trained on, such as a hash; recorded.
        metrics: its results; recorded.

    Raises:
        ValueError: the model has no adapter, one with NaN in it, or one that cannot be saved in this form.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter to save; call add_lora and train first")
    adapter = mounted_adapter(model)
    init = adapter.config.init
    if plain and init.startswith("loftq"):
        raise ValueError(
            f"init={init!r} fits the adapter to the error of its own 4-bit base, and on any other it makes things worse; save it with "
            "plain=False, and load it onto the full-precision model: its base is made again"
        )
    if not plain and init.startswith("pissa_niter"):
        raise ValueError(
            f"init={init!r} is random and cannot be made again from the base; save it with plain=True"
        )
    tensors = adapter_tensors(adapter, plain)
    start = adapter.start or {}
    provenance = {
        "base": start["origin"] if plain and start else fingerprint(model),
        "config": {**asdict(adapter.config), "targets": adapter.config.targets},
        "data": data,
        "metrics": metrics,
        "versions": versions(),
    }
    if start and not plain:
        settings = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in start["quantization"].items()}
        provenance["start"] = {"init": init, "origin": start["origin"], "quantization": settings}
    return write_folder(Path(path), tensors, peft_config(model, adapter, plain), provenance)


def adapter_tensors(adapter: Adapter, plain: bool) -> dict[str, Tensor]:
    """The tensors of the folder, by their names there."""
    tensors = {}
    for name, module in adapter.modules.items():
        if not isinstance(module, LoRALinear):
            tensors |= {
                f"{PREFIX}{name}.{key}": value.detach().clone() for key, value in module.state_dict().items()
            }
            continue
        A, B = plain_factors(module) if plain else (module.lora_A.detach(), module.lora_B.detach())
        parts = {"A": A, "B": B, "magnitude": getattr(module, "lora_magnitude", None)}
        for part, (key, _) in layer_tensors(f"{PREFIX}{name}", module, len(A)).items():
            tensors[key] = parts[part].detach().contiguous()
    return tensors


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> nn.Module:
    """Add the adapter in the PEFT folder `path` to a base model; in place. Weights are loaded bit for bit.

    Args:
        model: a base in 32 or 16 bits or quantized; it may have adapters of other names.
        path: folder written by `save_adapter` or by PEFT.
        name: of the adapter here.

    Returns:
        `model`, with the adapter in place.

    Raises:
        FileNotFoundError: no adapter there.
        AdapterMismatch: made for another base, or tensors missing, left over or of another shape. Nothing is changed.
        ValueError: a pickle file, damaged files, an unsupported kind of adapter, or `model` has one of this name already.
    """
    path = Path(path)
    raw, tensors = read_folder(path)
    if name in adapter_configs(model) or (lora_layers(model) and not adapter_configs(model)):
        raise ValueError(
            f"{type(model).__name__} has LoRA adapters already, one of them named {name!r}; load a fresh base model, or give "
            "another name: load_adapter(model, path, name)"
        )
    check_new(model, name)
    provenance = read_provenance(path)
    if provenance and "start" in provenance:
        return load_on_changed_base(model, path, raw, tensors, provenance, name)
    with base_only(model):
        check_base(model, path, provenance)
        config, names, saved = config_from_peft(model, raw, tensors, path)
        check_tensors(model, names, saved, tensors, config, path)
        adapter = make_adapter(model, config, names)
        fill(adapter, tensors)
    attach(model, name, adapter)
    return model


def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a folder, which fit, into the modules of an adapter."""
    with torch.no_grad():
        for name, module in adapter.modules.items():
            prefix = f"{PREFIX}{name}"
            if not isinstance(module, LoRALinear):
                module.load_state_dict({k: tensors[f"{prefix}.{k}"] for k in module.state_dict()})
                continue
            parts = {
                "A": module.lora_A,
                "B": module.lora_B,
                "magnitude": getattr(module, "lora_magnitude", None),
            }
            for part, (key, _) in layer_tensors(prefix, module, module.r).items():
                parts[part].copy_(tensors[key])


def load_on_changed_base(
    model: nn.Module, path: Path, raw: dict, tensors: dict[str, Tensor], provenance: dict, name: str
) -> nn.Module:
    """Load an adapter that is one with a 4-bit base of its own (LoftQ, QPiSSA): make that base again from the original."""
    start = provenance["start"]
    origin = start["origin"]
    if (
        adapter_configs(model)
        or any(isinstance(m, QuantLinear) for m in model.modules())
        or differences(origin, fingerprint(model))
    ):
        raise AdapterMismatch(
            f"the adapter in {path} (init={start['init']!r}) belongs to a 4-bit base that is made together with it. Load it onto the "
            "original model in full precision, without adapters"
        )
    config, names, saved = config_from_peft(model, raw, tensors, path)
    check_tensors(model, names, saved, tensors, config, path)
    settings = dict(start["quantization"])
    dtype = settings.pop("compute_dtype", None)
    if dtype is not None:
        settings["compute_dtype"] = getattr(torch, str(dtype).removeprefix("torch."))
    add_qlora(
        model, LoRAConfig(**{**asdict(config), "init": start["init"], "targets": exactly(names)}), name=name, **settings
    )
    if differences(provenance["base"], fingerprint(model)):
        raise AdapterMismatch(
            f"the 4-bit base of {path}, made again here, is not bit for bit that of the adapter: another version of the linear algebra "
            "library rounds otherwise. Load a fresh model, and train here, or save with plain=True there"
        )
    fill(mounted_adapter(model), tensors)
    return model


def exactly(names: list[str]) -> str:
    """A regular expression for these full names."""
    return "(" + "|".join(re.escape(name) for name in names) + ")"
