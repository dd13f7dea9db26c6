"""PEFT's `adapter_config.json` of the LoRA family: from a `LoRAConfig`, and back.

PEFT's configuration has some forty keys. Those that change what a model computes are either understood here
or refused by name; the others (how it was trained, on which hub, under which version) are passed over.

Agrees with: PEFT `tuners/lora/config.py`; `tuners/tuners_utils.py`, `check_target_module_exists`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from labkit.formats.peft_folder import CONFIG, PREFIX, refuse_settings
from labkit.formats.peft_tensors import STORED
from labkit.lora.config import LoRAConfig, pattern_matches
from labkit.lora.mounting import Adapter
from labkit.lora.plain import plain_config
from labkit.models.surgery import ends_with
from labkit.quant.layer_kinds import is_conv1d

PLAIN = {"bias": ("none",), "lora_bias": (False, None)}
UNKNOWN_WHEN_SET = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
# the others change the base in ways of their own
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora")


def to_peft(model: nn.Module, adapter: Adapter, plain: bool) -> dict:
    """`adapter_config.json` of an adapter: keys that every version of PEFT knows, others only where needed.

    Args:
        model: that has the adapter.
        adapter: the mounted one.
        plain: PiSSA and OLoRA as plain LoRA, see `labkit.formats.adapters.save_adapter`.
    """
    config = plain_config(adapter.config) if plain else adapter.config
    layers = adapter.layers
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
        "use_rslora": config.is_rslora,
        "use_dora": config.is_dora,
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
    """Last parts of names if they mean just these layers of the base, else full names, else an expression."""
    modules = [n for n, _ in model.named_modules() if n not in saved and not within(n, (*names, *saved))]
    for chosen in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {n for n in modules if any(ends_with(n, c) for c in chosen)} == set(names):
            return chosen
    return "|".join(re.escape(name) for name in sorted(names))


def within(name: str, parents: Iterable[str]) -> bool:
    """Is `name` that of a module inside one of `parents`, full names?"""
    return any(name.startswith(f"{parent}.") for parent in parents)


def check_settings(raw: dict, path: Path) -> None:
    """Raise a `ValueError` that names the settings which `load_adapter` cannot follow, if there are any."""
    unknown = [key for key, fine in PLAIN.items() if raw.get(key, fine[0]) not in fine]
    unknown += [key for key in UNKNOWN_WHEN_SET if raw.get(key)]
    unknown += ["init_lora_weights"] if raw.get("init_lora_weights") not in STARTS else []
    unknown = ["peft_type"] if raw.get("peft_type") != "LORA" else unknown
    refuse_settings(
        path,
        raw,
        unknown,
        "; it reads LoRA, rsLoRA, DoRA, PiSSA and OLoRA. (A random PiSSA start cannot be made again from "
        "the base: convert it when saving, with PEFT's path_initial_model_for_weight_conversion.)",
    )
    missing = [key for key in ("r", "lora_alpha") if key not in raw]
    if missing:
        raise ValueError(f"{path / CONFIG} lacks {', '.join(missing)}; save the adapter again")


def from_peft(
    model: nn.Module, raw: dict, tensors: dict[str, Tensor], path: Path
) -> tuple[LoRAConfig, list[str]]:
    """The config of an adapter, and the full names of the layers of `model` that it says it adapts.

    Raises:
        ValueError: a value is out of its range.
    """
    modules = [name for name, _ in model.named_modules() if name]
    wanted = raw.get("modules_to_save") or []
    stored = {m.group(1).removeprefix(PREFIX) for key in tensors if (m := STORED.fullmatch(key))}
    full = {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if not STORED.fullmatch(key)}
    # PEFT: a name that ends with one of them, dot or not; of nested modules the outermost
    saved = [n for n in modules if any(n.endswith(w) for w in wanted)]
    saved = [n for n in saved if not within(n, saved)]
    saved = [n for n in saved if n in wanted or n in full or any(within(f, [n]) for f in full)]
    names = [n for n in modules if is_target(n, raw, stored) and n not in saved and not within(n, saved)]
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
    return config, names


def is_target(name: str, raw: dict, stored: set[str]) -> bool:
    """Does PEFT's `check_target_module_exists` say that the module `name` has an adapter?"""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    if excluded and matches(name, excluded):
        return False
    if targets is None or targets == "all-linear":
        return name in stored
    if not matches(name, targets):
        return False
    numbers = raw.get("layers_to_transform")
    if isinstance(targets, str) or numbers is None or numbers == []:
        return True
    pattern = raw.get("layers_pattern") or [r"[^.]*"]
    found = [
        re.match(rf"(?:.*?\.)?{p}\.(\d+)\.", name)
        for p in ([pattern] if isinstance(pattern, str) else pattern)
    ]
    index = next((int(m.group(1)) for m in found if m), None)
    return index in ([numbers] if isinstance(numbers, int) else numbers)


def matches(name: str, wanted: str | Iterable[str]) -> bool:
    """Does PEFT take the module `name` as meant by an expression, or by last parts of names?"""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(ends_with(name, end) for end in wanted)
