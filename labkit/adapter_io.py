"""Adapters on disk, in the format of Hugging Face PEFT, so that every production stack can load what is trained here.

A folder with `adapter_model.safetensors` (tensors `base_model.model.<module>.lora_A.weight`, (r, in), and `.lora_B.weight`,
(out, r)) and `adapter_config.json`. Beside them this writes `labkit.json`, which PEFT ignores: a fingerprint of the base
model. An adapter is a *difference*; on another base it is noise, silently. So loading compares the fingerprints.

Loading never guesses: a tensor too many, one too few, or one of another shape is an error that names it. That is how
other loaders come to act as the identity, with an adapter of which no key matched.

Agrees with: PEFT `utils/save_and_load.py` (a folder from here loads there, and the other way round).
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labkit.lora import LoRAConfig, add_lora, lora_layers
from labkit.quant_linear import QuantLinear

WEIGHTS, CONFIG, PROVENANCE = "adapter_model.safetensors", "adapter_config.json", "labkit.json"
PREFIX = "base_model.model."


class AdapterMismatch(ValueError):
    """The adapter does not belong to this model; the message says what differs."""


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Save the LoRA adapter of `model` as a PEFT folder.

    The folder is written under a temporary name and renamed, so that an old adapter at `path` is replaced whole or not
    at all.

    Args:
        model: with adapters (`add_lora`), merged or not.
        path: folder to write; its parent is made if need be.

    Raises:
        ValueError: the model has no adapter, or one with NaN in it.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter to save; call add_lora and train first")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{broken[0]} and {len(broken) - 1} more tensors hold NaN or infinity; nothing was saved"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(peft_config(model, list(layers)), indent=2))
        (scratch / PROVENANCE).write_text(json.dumps({"base": fingerprint(model)}, indent=2))
        replace_folder(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def replace_folder(new: Path, path: Path) -> None:
    """Move the folder `new` to `path`; what was there before goes only once `new` is in its place."""
    old = new.with_name(new.name + "-old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def peft_config(model: nn.Module, names: list[str]) -> dict:
    """`adapter_config.json`: only keys that every version of PEFT knows."""
    config: LoRAConfig = model.lora_config
    last_parts = sorted({name.rpartition(".")[2] for name in names})
    every = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, QuantLinear))
    }
    adapted_only_by_last_part = not (
        set(last_parts) & every
    )  # adapted layers are LoRALinear, their bases "…base"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", ""),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": last_parts if adapted_only_by_last_part else sorted(names),
        "use_rslora": config.variant == "rslora",
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
    }


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Add the adapter in the PEFT folder `path` to a base model; in place. Weights are loaded bit for bit.

    Args:
        model: a base without adapters, in 32 or 16 bits or quantized.
        path: folder written by `save_adapter` or by PEFT.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: no adapter there.
        AdapterMismatch: made for another base, or tensors missing, left over or of another shape. Nothing is changed.
        ValueError: a pickle file, damaged files, an unsupported kind of adapter, or `model` has an adapter already.
    """
    path = Path(path)
    raw, tensors = read_folder(path)
    if lora_layers(model):
        raise ValueError(f"{type(model).__name__} has LoRA adapters already; load a fresh base model first")
    names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    config = LoRAConfig(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        targets=names,
        variant="rslora" if raw.get("use_rslora") else "lora",
    )
    check_base(model, path)
    check_shapes(model, names, tensors, config.r, path)
    add_lora(model, config)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
    return model


def read_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder.

    Raises:
        FileNotFoundError, ValueError: see `load_adapter`.
    """
    if not (path / WEIGHTS).exists():
        if (path / "adapter_model.bin").exists():
            raise ValueError(
                f"{path} holds adapter_model.bin, a pickle file, which can run any code when it is loaded. Save the adapter "
                "again with safe_serialization=True, PEFT's default for years, and load that"
            )
        raise FileNotFoundError(
            f"there is no {WEIGHTS} in {path}; give the folder that save_adapter or PEFT wrote"
        )
    try:
        raw = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"the adapter in {path} is damaged or incomplete ({error}); save or copy it again"
        ) from None
    wrong = [
        key
        for key, fine in (("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False))
        if raw.get(key, fine) != fine
    ]
    wrong += [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if raw.get(key)]
    if raw.get("peft_type") != "LORA" or wrong:
        what = ", ".join(f"{key}={raw[key]!r}" for key in wrong) or f"peft_type={raw.get('peft_type')!r}"
        raise ValueError(
            f"the adapter in {path} has {what}, which this loader does not know; it reads plain LoRA and rsLoRA"
        )
    return raw, tensors


def check_base(model: nn.Module, path: Path) -> None:
    """Compare the recorded fingerprint of the base with that of `model`; a folder without one passes."""
    try:
        recorded = json.loads((path / PROVENANCE).read_text())["base"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path / PROVENANCE} is damaged; delete it to load the adapter without checking its base"
        ) from None
    mine = fingerprint(model)
    if recorded["shapes"] != mine["shapes"]:
        raise AdapterMismatch(
            f"the adapter in {path} was made for a model of other layers or sizes than this {mine['class']}"
        )
    differs = [
        part
        for part in ("linears", "rest")
        if recorded[f"{part}_kind"] == mine[f"{part}_kind"] and recorded[part] != mine[part]
    ]
    if differs:
        hashes = ", ".join(f"{part} {recorded[part][:8]}… against {mine[part][:8]}… here" for part in differs)
        raise AdapterMismatch(
            f"the adapter in {path} was trained on a base of the same shape but with other weights (fingerprints: {hashes}). "
            f"On this base it would be noise. Load the base that it was trained on, or delete {PROVENANCE} to insist"
        )


def check_shapes(model: nn.Module, names: list[str], tensors: dict[str, Tensor], r: int, path: Path) -> None:
    modules = dict(model.named_modules())
    problems = []
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, QuantLinear)):
            problems.append(f"{name}: no such linear layer in {type(model).__name__}")
            continue
        for part, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r))):
            key = f"{PREFIX}{name}.{part}.weight"
            if key not in tensors:
                problems.append(f"{key} is missing")
            elif tuple(tensors[key].shape) != shape:
                problems.append(f"{key} has shape {tuple(tensors[key].shape)}, not {shape}")
    wanted = {f"{PREFIX}{name}.{part}.weight" for name in names for part in ("lora_A", "lora_B")}
    problems += [f"{key} is not a LoRA weight" for key in sorted(set(tensors) - wanted)]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterMismatch(f"the adapter in {path} does not fit: {'; '.join(problems[:3])}{more}")


def fingerprint(model: nn.Module) -> dict:
    """Hashes that tell base models apart: of the linear weights (`linears`), and of all others (`rest`).

    The same base in 4 bits and in 32, or in bf16 and in fp32, has other bytes. `linears_kind` and `rest_kind` say which
    they are, and only hashes of the same kind are compared. Adapters, merged or not, do not count.
    """
    originals = {id(layer.base): layer.merged_from for layer in lora_layers(model).values()}
    linears = {
        name.removesuffix(".base"): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLinear))
    }
    hash_linears, hash_rest, kinds = hashlib.sha256(), hashlib.sha256(), set()
    for _, module in sorted(linears.items()):
        if isinstance(module, QuantLinear):
            kinds.add(f"{module.codebook}/{module.blocksize}{'/double' if module.double_quant else ''}")
            update(hash_linears, module.packed)
        else:
            original = originals.get(id(module))
            kinds.add(str(module.weight.dtype))
            update(hash_linears, module.weight if original is None else original)
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
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
