"""Adapters of the LoRA family on disk, in the format of Hugging Face PEFT, which production stacks load.

`labkit.formats.peft_config` and `peft_tensors` say what is in the folder. Beside it stands `labkit.json`,
which PEFT ignores: where the adapter comes from, and a fingerprint of its base. An adapter is a *difference*;
on another base it is noise, silently. So loading compares the fingerprints.

PiSSA is a difference to a base that it changed itself. It is saved as plain LoRA of rank 2r on the original
base, which any stack can serve, or (plain=False) as PEFT saves it: the loader then has to repeat the
decomposition of the base.

Agrees with: PEFT `utils/save_and_load.py` (a folder from here loads there, and the other way round).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.formats.new_weights import brought_along
from labkit.formats.peft_config import base_place, check_settings, from_peft, to_peft
from labkit.formats.peft_folder import read_folder, write_folder
from labkit.formats.peft_tensors import adapter_tensors, check_adapter, fill
from labkit.formats.provenance import (
    check_base,
    check_saved,
    read_provenance,
    record,
    seal,
)
from labkit.lora.adapters import adapter_configs, base_only, check_new
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch, differences, fingerprint
from labkit.lora.inject import lora_layers, make_adapter
from labkit.lora.mounting import attach, check_standing, mounted_adapter
from labkit.lora.qlora import add_qlora
from labkit.models.restoring import unchanged_on_error
from labkit.models.walk import adapters_in, unwrap
from labkit.quant.config import QuantConfig
from labkit.quant.linear import QuantLinear


def save_adapter(
    model: nn.Module,
    path: str | Path,
    plain: bool = True,
    data: object = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save the mounted adapter of `model` as a PEFT folder.

    An old adapter at `path` is replaced whole or not at all; what else lies in the folder stays. A classifier's head
    and new rows of embeddings, which nobody else has, are saved with the adapter (`labkit.formats.new_weights`).

    Args:
        model: with an adapter (`add_lora`), merged or not; in `torch.compile`, data parallelism or on its own.
        path: folder to write; its parent is made if need be.
        plain: write PiSSA and OLoRA as LoRA of rank 2r on the original base. False: as a difference to the
            base that they changed, which loading makes again. LoftQ, whose base nobody else has, needs False.
        data: what it was trained on, such as a hash; recorded.
        metrics: its results; recorded.

    Returns:
        `path`.

    Raises:
        ValueError: the model has no adapter, one with NaN in it, one of which a layer was replaced, or one that
            cannot be saved in this form; or `data` or `metrics` are nothing that JSON can hold.
        labkit.files.CannotWrite: no space, no permission; the old adapter is intact.
    """
    adapter = mounted_adapter(model)
    if adapter is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no LoRA adapter to save; call add_lora and train first"
        )
    check_standing(model)
    config, init = adapter.config, adapter.config.init
    if plain and config.is_loftq:
        raise ValueError(
            f"init={init!r} fits the adapter to the error of its own 4-bit base, and on any other it makes "
            "things worse; save it with plain=False, and load it onto the full-precision model: its base is "
            "made again"
        )
    if not plain and config.is_pissa and config.start_iterations is not None:
        raise ValueError(
            f"init={init!r} is random and cannot be made again from the base; save it with plain=True"
        )
    start = adapter.start or {}
    whole, alone = ({}, []) if start else brought_along(model, adapter, base_place(unwrap(model)))
    saved = replace(adapter, modules=adapter.modules | whole)
    replaces = sorted(name for name in saved.modules if name not in saved.layers)
    base = start["origin"] if plain and start else fingerprint(model, replaces)
    others: dict[str, object] = {"replaces": replaces, "depends_on": alone}
    if start and not plain:
        made = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in start["quantization"].items()}
        others["start"] = {"init": init, "origin": start["origin"], "quantization": made}
    provenance = record(base, asdict(config), data, metrics, **others)
    tensors, settings = adapter_tensors(saved, plain), to_peft(model, saved, plain)
    return write_folder(Path(path), tensors, settings, seal(provenance, tensors, settings))


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> nn.Module:
    """Add the adapter in the PEFT folder `path` to a base model; in place. Weights are loaded bit for bit.

    Args:
        model: a base in 32 or 16 bits or quantized; it may have adapters of other names.
        path: folder written by `save_adapter` or by PEFT.
        name: of the adapter here.

    Returns:
        `model`, with the adapter mounted.

    Raises:
        FileNotFoundError: no adapter there.
        AdapterMismatch: made for another base, or tensors missing, left over or of another shape. Nothing is
            changed.
        ValueError: a pickle file, damaged or edited files, an unsupported kind of adapter, or `model` has one of
            this name already. Nothing is changed.
    """
    path = Path(path)
    raw, tensors = read_folder(path)
    provenance = read_provenance(path)
    check_settings(raw, path, recorded_start=provenance is not None and "start" in provenance)
    check_free(model, name)
    if provenance and "start" in provenance:
        load_on_changed_base(model, path, raw, tensors, provenance, name)
        return model
    with unchanged_on_error(model), base_only(model):
        check_base(model, path, provenance)
        config, names = from_peft(model, raw, tensors, path)
        check_adapter(model, config, names, tensors, path)
        check_saved(raw, tensors, path, provenance)
        adapter = make_adapter(model, config, names)
        fill(adapter, tensors)
    attach(model, name, adapter)
    return model


def check_free(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` if `model` has an adapter of this name, or one beside which there can be no other."""
    kind, others = type(unwrap(model)).__name__, [one for one in adapters_in(model) if one != "LoRA"]
    if others:
        raise ValueError(
            f"{kind} has {' and '.join(others)} already, which a LoRA adapter would freeze; load a fresh base model"
        )
    if name in adapter_configs(model) or (lora_layers(model) and not adapter_configs(model)):
        raise ValueError(
            f"{kind} has LoRA adapters already, one of them named {name!r}; load a fresh base model, or give another "
            "name: load_adapter(model, path, name)"
        )
    check_new(model, name)


def load_on_changed_base(
    model: nn.Module, path: Path, raw: dict, tensors: dict[str, Tensor], provenance: dict, name: str
) -> None:
    """Load an adapter and the 4-bit base it was made with (LoftQ, QPiSSA), from the original base.

    Whether the base that is made again is that of the adapter shows only at the end; if it is not, `model` is put
    back as it was. Until then its full weights stay in memory.
    """
    start = provenance["start"]
    changed = adapter_configs(model) or any(isinstance(m, QuantLinear) for m in model.modules())
    here = fingerprint(model, provenance.get("replaces", ()))
    if changed or differences(start["origin"], here, strict=True):
        raise AdapterMismatch(
            f"the adapter in {path} (init={start['init']!r}) belongs to a 4-bit base that is made together "
            "with it. Load it onto the original model in full precision, without adapters"
        )
    config, names = from_peft(model, raw, tensors, path)
    check_adapter(model, config, names, tensors, path)
    check_saved(raw, tensors, path, provenance)
    config, quantization = how_made(config, start, path)
    with unchanged_on_error(model):
        add_qlora(model, replace(config, targets=exactly(names)), name=name, **quantization)
        check_base_again(model, path, provenance)
        fill(mounted_adapter(model), tensors)


def how_made(config: LoRAConfig, start: dict, path: Path) -> tuple[LoRAConfig, dict]:
    """The start and the quantization with which the base of an adapter was made.

    Raises:
        ValueError: there are no such settings, or the start is one that cannot be made again.
    """
    settings = dict(start["quantization"])
    try:
        dtype = settings.get("compute_dtype")
        if dtype is not None:
            settings["compute_dtype"] = getattr(torch, str(dtype).removeprefix("torch."))
        QuantConfig.of(None, **settings)
        config = replace(config, init=start["init"])
        if config.is_pissa and config.start_iterations is not None:
            raise ValueError(f"init={start['init']!r} is random")
        if not config.starts_from_weight:
            raise ValueError(f"init={start['init']!r} changes no base")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the base of the adapter in {path} cannot be made again: {error}") from None
    return config, settings


def check_base_again(model: nn.Module, path: Path, provenance: dict) -> None:
    """Raise an `AdapterMismatch` unless the base that was made again is bit for bit that of the adapter."""
    again = fingerprint(model, provenance.get("replaces", ()))
    if differences(provenance["base"], again, strict=True):
        raise AdapterMismatch(
            f"the 4-bit base of {path}, made again here, is not bit for bit that of the adapter: another "
            "version of the linear algebra library rounds otherwise. Load a fresh model and train here, or "
            "save with plain=True there"
        )


def exactly(names: list[str]) -> str:
    """A regular expression for these full names."""
    return "(" + "|".join(re.escape(name) for name in names) + ")"
