"""PEFT's `adapter_config.json`: writing it, reading it, and whether what it says fits a model.

PEFT's configuration has some forty keys. Those that change what a model computes are either understood here or refused by name;
the others (how it was trained, on which hub, under which version) are passed over.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labkit.formats.provenance import PROVENANCE
from labkit.lora.config import LoRAConfig, pattern_matches
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.mounting import Adapter
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.lora.plain import plain_config
from labkit.lora.targets import saved_names
from labkit.models.surgery import ends_with
from labkit.quant.linears import is_conv1d, is_linear, widths

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

PLAIN = {"bias": ("none",), "lora_bias": (False, None)}
UNKNOWN_WHEN_SET = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
STARTS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
    "pissa",
    "olora",
)  # the others change the base in ways of their own
STORED = re.compile(r"(.*)\.(?:lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")


def peft_config(model: nn.Module, adapter: Adapter, plain: bool) -> dict:
    """`adapter_config.json`: only keys that every version of PEFT knows, and others where they say something."""
    config = plain_config(adapter.config) if plain else adapter.config
    layers = {name: module for name, module in adapter.modules.items() if isinstance(module, LoRALinear)}
    saved = [name for name in adapter.modules if name not in layers]
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", ""),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_modules(model, list(layers), saved),
        "use_rslora": config.variant.startswith("rs"),
        "use_dora": config.variant.endswith("dora"),
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    if config.init in ("pissa", "olora"):
        values["init_lora_weights"] = config.init
    extra = {
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": saved,
    }
    return values | {key: value for key, value in extra.items() if value}


def target_modules(model: nn.Module, names: list[str], saved: list[str]) -> list[str] | str:
    """Last parts of names if they mean just these layers in this model, else full names, else an expression."""
    others = [n for n, _ in model.named_modules() if not any(n == s or n.startswith(f"{s}.") for s in saved)]
    for chosen in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {n for n in others if any(ends_with(n, c) for c in chosen)} == set(names):
            return chosen
    return "|".join(re.escape(name) for name in sorted(names))


def write_folder(path: Path, tensors: dict[str, Tensor], config: dict, provenance: dict) -> Path:
    """Write a PEFT folder with a `labkit.json` under a temporary name and rename it, so that an old one at `path` is replaced whole
    or not at all.

    Raises:
        ValueError: a tensor holds NaN or infinity; nothing is written then.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{broken[0]} and {len(broken) - 1} more tensors hold NaN or infinity; nothing was saved"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2))
        (scratch / PROVENANCE).write_text(json.dumps(provenance, indent=2))
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


def read_files(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder of any kind.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is a pickle file, or damaged.
    """
    if not (path / WEIGHTS).exists():
        if (path / "adapter_model.bin").exists():
            raise ValueError(
                f"{path} holds adapter_model.bin, a pickle file, which can run any code when it is loaded. Save the adapter "
                "again with safe_serialization=True, PEFT's default for years, and load that"
            )
        raise FileNotFoundError(f"there is no {WEIGHTS} in {path}; give the folder that labkit or PEFT wrote")
    try:
        raw = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / WEIGHTS)
        raw["peft_type"]
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"the adapter in {path} is damaged or incomplete ({error!r}); save or copy it again"
        ) from None
    return raw, tensors


def read_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder of the LoRA family.

    Raises:
        FileNotFoundError, ValueError: see `labkit.load_adapter`.
    """
    raw, tensors = read_files(path)
    wrong = [key for key, fine in PLAIN.items() if raw.get(key, fine[0]) not in fine]
    wrong += [key for key in UNKNOWN_WHEN_SET if raw.get(key)]
    wrong += ["init_lora_weights"] if raw.get("init_lora_weights") not in STARTS else []
    wrong = ["peft_type"] if raw.get("peft_type") != "LORA" else wrong
    if wrong:
        what = ", ".join(f"{key}={raw.get(key)!r}" for key in wrong)
        raise ValueError(
            f"the adapter in {path} has {what}, which this loader does not know; it reads LoRA, rsLoRA, DoRA, PiSSA and OLoRA. "
            "(A random PiSSA start cannot be made again from the base: convert it when saving, with PEFT's "
            "path_initial_model_for_weight_conversion.)"
        )
    missing = [key for key in ("r", "lora_alpha") if key not in raw]
    if missing:
        raise ValueError(f"{path / CONFIG} lacks {', '.join(missing)}; save the adapter again")
    return raw, tensors


def config_from_peft(
    model: nn.Module, raw: dict, tensors: dict[str, Tensor], path: Path
) -> tuple[LoRAConfig, list[str], list[str]]:
    """The config of an adapter, the layers of `model` that it says it adapts, and the modules that it trained in full."""
    modules = [name for name, _ in model.named_modules() if name]
    wanted = raw.get("modules_to_save") or []
    stored = {m.group(1).removeprefix(PREFIX) for key in tensors if (m := STORED.fullmatch(key))}
    full = {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if not STORED.fullmatch(key)}
    # PEFT: a name that ends with one of them, dot or not; of nested modules the outermost
    saved = [n for n in modules if any(n.endswith(w) for w in wanted)]
    saved = [n for n in saved if not any(n.startswith(f"{other}.") for other in saved)]
    saved = [
        n for n in saved if any(f == n or f.startswith(f"{n}.") for f in full) or any(n == w for w in wanted)
    ]
    names = [
        n
        for n in modules
        if is_target(n, raw, stored) and not any(n == s or n.startswith(f"{s}.") for s in saved)
    ]
    variant = ("rs" if raw.get("use_rslora") else "") + ("dora" if raw.get("use_dora") else "lora")
    patterns = {
        key: {k: v for k, v in (raw.get(key) or {}).items() if any(pattern_matches(k, n) for n in names)}
        for key in ("rank_pattern", "alpha_pattern")
    }
    start = raw.get("init_lora_weights")
    try:
        config = LoRAConfig(
            r=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            targets=names or sorted(stored) or ["none"],
            variant=variant,
            init=start if start in ("pissa", "olora") else "default",
            modules_to_save=saved,
            **patterns,
        )
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    return config, names, saved


def is_target(name: str, raw: dict, stored: set[str]) -> bool:
    """Does the configuration say that the module `name` has an adapter? As PEFT's `check_target_module_exists`."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    if excluded and (
        re.fullmatch(excluded, name)
        if isinstance(excluded, str)
        else any(ends_with(name, e) for e in excluded)
    ):
        return False
    if targets is None or targets == "all-linear":
        return name in stored
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if not any(ends_with(name, t) for t in targets):
        return False
    numbers = raw.get("layers_to_transform")
    if numbers is None or numbers == []:
        return True
    pattern = raw.get("layers_pattern") or [r"[^.]*"]
    found = [
        re.match(rf"(?:.*?\.)?{p}\.(\d+)\.", name)
        for p in ([pattern] if isinstance(pattern, str) else pattern)
    ]
    index = next((int(m.group(1)) for m in found if m), None)
    return index in ([numbers] if isinstance(numbers, int) else numbers)


def layer_tensors(
    prefix: str, layer: nn.Module, r: int, dora: bool | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a folder holds of an adapted layer: {part: (name of the tensor, shape)}.

    Args:
        prefix: of the tensors' names, "base_model.model.<module>".
        layer: a layer with an adapter, or the base layer that gets one.
        r: rank.
        dora: is there a magnitude? Default: as `layer` has.
    """
    if isinstance(layer, (LoRAEmbedding, nn.Embedding)):
        inputs, outputs = (
            widths(layer) if isinstance(layer, nn.Embedding) else (layer.in_features, layer.out_features)
        )
        return {
            "A": (f"{prefix}.lora_embedding_A", (r, inputs)),
            "B": (f"{prefix}.lora_embedding_B", (outputs, r)),
        }
    inputs, outputs = (layer.in_features, layer.out_features) if hasattr(layer, "lora_A") else widths(layer)
    parts = {"A": (f"{prefix}.lora_A.weight", (r, inputs)), "B": (f"{prefix}.lora_B.weight", (outputs, r))}
    if hasattr(layer, "lora_magnitude") if dora is None else dora:
        parts["magnitude"] = (f"{prefix}.lora_magnitude_vector", (outputs,))
    return parts


def check_tensors(
    model: nn.Module,
    names: list[str],
    saved: list[str],
    tensors: dict[str, Tensor],
    config: LoRAConfig,
    path: Path,
) -> None:
    """Raise an `AdapterMismatch` that names every tensor that is missing, left over, or of another shape."""
    modules = dict(model.named_modules())
    wanted: dict[str, tuple[int, ...]] = {}
    problems, dora = [], config.variant.endswith("dora")
    for name in names:
        if is_linear(modules[name]) or isinstance(modules[name], nn.Embedding):
            parts = layer_tensors(f"{PREFIX}{name}", modules[name], config.for_layer(name).r, dora)
            wanted |= dict(parts.values())
        else:
            problems.append(f"{name} is a {type(modules[name]).__name__}, which cannot have an adapter here")
    for name in saved:
        wanted |= {f"{PREFIX}{name}.{key}": tuple(t.shape) for key, t in modules[name].state_dict().items()}
    for key, shape in wanted.items():
        if key not in tensors:
            problems.append(f"{key} is missing")
        elif tuple(tensors[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, not {shape}")
    for key in sorted(set(tensors) - set(wanted)):
        module = (STORED.fullmatch(key) or re.fullmatch(r"(.*)\.[^.]*", key))[1].removeprefix(PREFIX)
        if key.endswith(".base_layer.weight"):  # PEFT saves an adapted embedding's base too
            own = modules.get(module.removesuffix(".base_layer"))
            if (
                own is None
                or own.weight.shape != tensors[key].shape
                or not torch.equal(own.weight.to(tensors[key]), tensors[key])
            ):
                problems.append(f"{key} is not the weight of this base: was its vocabulary changed?")
        elif not STORED.fullmatch(key):
            problems.append(f"{key} is not a LoRA weight, nor of a module in modules_to_save")
        elif module not in modules:
            problems.append(f"{module}: no such linear layer in {type(model).__name__}")
        else:
            problems.append(
                f"{key} is left over: target_modules do not mean {module}, or it is of another variant"
            )
    if not names and not problems:
        problems.append(f"its target_modules mean no layer of {type(model).__name__}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterMismatch(f"the adapter in {path} does not fit: {'; '.join(problems[:3])}{more}")
    saved_names(model, saved)  # refuses tied weights and quantized modules
