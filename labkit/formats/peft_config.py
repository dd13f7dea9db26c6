"""PEFT's `adapter_config.json` of the LoRA family: from a `LoRAConfig`, and back.

PEFT's configuration has some forty keys. Those that change what a model computes are either understood here
or refused by name; the others (how it was trained, on which hub, under which version) are passed over.

Agrees with: PEFT `tuners/lora/config.py`; `tuners/tuners_utils.py`, `check_target_module_exists`.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from labkit.formats.peft_folder import CONFIG, PREFIX
from labkit.formats.peft_settings import (
    are_layers,
    are_names,
    are_names_or_pattern,
    by_pattern,
    check_config,
    check_expressions,
    is_count,
    is_factor,
    is_share,
    is_switch,
    shown,
)
from labkit.formats.peft_tensors import STORED
from labkit.lora.config import LoRAConfig, pattern_matches
from labkit.lora.fingerprint import is_within
from labkit.lora.mounting import Adapter
from labkit.lora.plain import plain_config
from labkit.models.fetching import SOURCES
from labkit.models.loading import SHIPPED
from labkit.models.patterns import matches_whole
from labkit.models.surgery import ends_with
from labkit.models.walk import places, unwrap
from labkit.paths import cache_folder, data_folder
from labkit.quant.layer_kinds import is_conv1d

FOLLOWS = {
    "peft_type": lambda value: value == "LORA",
    "r": is_count,
    "lora_alpha": is_factor,
    "lora_dropout": is_share,
    "target_modules": are_names_or_pattern,
    "exclude_modules": are_names_or_pattern,
    "layers_to_transform": are_layers,
    "layers_pattern": are_names_or_pattern,
    "rank_pattern": by_pattern(is_count),
    "alpha_pattern": by_pattern(is_factor),
    "modules_to_save": are_names,
    "use_rslora": is_switch,
    "use_dora": is_switch,
    "fan_in_fan_out": is_switch,  # PEFT's layers see for themselves, and so do ours
}
# the other starts change the base in ways of their own
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora")
USUAL = {"bias": ("none",), "lora_bias": (False, None)}
# they say how to train, or more about a start or a variant, which is refused if it is not known
PASSED_OVER = (
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "velora_config",
)  # fmt: skip
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


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
    values = {
        "peft_type": "LORA",
        **named_base(model),
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
    if config.starts_from_weight:  # PEFT makes PiSSA and OLoRA again, and refuses LoftQ, whose base it cannot
        values["init_lora_weights"] = "loftq" if config.is_loftq else config.init
    extra = {
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": saved,
    }
    return values | {key: value for key, value in extra.items() if value}


def named_base(model: nn.Module) -> dict[str, object]:
    """What a configuration says of the base, so that PEFT's `AutoPeftModel…` find it: task, class and place."""
    inner = unwrap(model)
    kind = type(inner).__name__
    task = next((task for end, task in TASKS.items() if kind.endswith(end)), None)
    said: dict[str, object] = {"task_type": task, "base_model_name_or_path": base_place(inner)}
    if task is None and type(inner).__module__.startswith("transformers."):
        said["auto_mapping"] = {"base_model_class": kind, "parent_library": type(inner).__module__}
    return said


def base_place(model: nn.Module) -> str:
    """The folder of a base that is on this machine, or its name on the hub; "" if it says neither.

    Our own names ("tiny-llama") mean nothing to other libraries: their folders do.
    """
    return place_of_base(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def place_of_base(name: str) -> str:
    """The folder of the base called `name`, if it is on this machine; else `name`."""
    if name in SHIPPED:
        return str(data_folder() / name)
    if name in SOURCES:
        return str(cache_folder() / name)
    return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().is_dir() else name


def target_modules(model: nn.Module, names: list[str], saved: list[str]) -> list[str] | str:
    """Last parts of names if they mean just these layers of the base, else full names, else an expression."""
    modules = [n for n, _, _ in places(model) if n and not is_within(n, saved)]
    for chosen in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {n for n in modules if any(ends_with(n, c) for c in chosen)} == set(names):
            return chosen
    return "|".join(re.escape(name) for name in sorted(names))


def check_settings(raw: dict, path: Path, recorded_start: bool = False) -> None:
    """Raise a `ValueError` that names the settings which `load_adapter` cannot follow, if there are any.

    Args:
        raw: the configuration.
        path: of the folder.
        recorded_start: does `labkit.json` say how the base of a LoftQ adapter is made?
    """
    if raw["peft_type"] != "LORA":
        raise ValueError(
            f"the adapter in {path} has peft_type={shown(raw['peft_type'])}; this loader reads LoRA, rsLoRA, DoRA, PiSSA "
            "and OLoRA, and labkit.formats.load_alternative (IA)^3, prompts and prefixes"
        )
    check_config(
        raw,
        path / CONFIG,
        FOLLOWS,
        USUAL | {"init_lora_weights": (*STARTS, "loftq") if recorded_start else STARTS},
        PASSED_OVER,
        required=("r", "lora_alpha"),
        advice={
            "init_lora_weights": "A random start, or one from data, cannot be made again from the base: convert it "
            "when saving, with PEFT's path_initial_model_for_weight_conversion"
        },
    )
    of_layers = raw.get("layers_pattern") or ()
    expressions = [raw[key] for key in ("target_modules", "exclude_modules") if isinstance(raw.get(key), str)]
    expressions += [of_layers] if isinstance(of_layers, str) else of_layers
    check_expressions(
        path / CONFIG, [*expressions, *(raw.get("rank_pattern") or ()), *(raw.get("alpha_pattern") or ())]
    )


def from_peft(
    model: nn.Module, raw: dict, tensors: dict[str, Tensor], path: Path
) -> tuple[LoRAConfig, list[str]]:
    """The config of an adapter, and the full names of the layers of `model` that it says it adapts.

    Raises:
        ValueError: a value is out of its range.
    """
    modules = [name for name, _, _ in places(model) if name]
    wanted = raw.get("modules_to_save") or []
    stored = {m.group(1).removeprefix(PREFIX) for key in tensors if (m := STORED.fullmatch(key))}
    full = {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if not STORED.fullmatch(key)}
    brought = {parent for name in full for parent in parents(name)}
    # PEFT: a name that ends with one of them, dot or not; of nested modules the outermost
    saved = [n for n in modules if n.endswith(tuple(wanted))]
    saved = [n for n in saved if not any(parent in saved for parent in parents(n) if parent != n)]
    saved = [n for n in saved if n in wanted or n in brought]
    targeted = is_targeted(raw, stored)
    names = [n for n in modules if targeted(n) and not is_within(n, saved)]
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
            dropout=raw.get("lora_dropout") or 0.0,
            targets=names or sorted(stored) or ["none"],
            variant=variant,
            init=start if start in ("pissa", "olora") else "default",
            modules_to_save=saved,
            **patterns,
        )
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    return config, names


def parents(name: str) -> list[str]:
    """`name` and the names of the modules around it.

    >>> parents("layers.0.mlp")
    ['layers', 'layers.0', 'layers.0.mlp']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def is_targeted(raw: dict, stored: set[str]) -> Callable[[str], bool]:
    """Does PEFT's `check_target_module_exists` say that a module has an adapter? By its name."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    numbers = raw.get("layers_to_transform")
    left_out = meaning(excluded or ())
    if targets is None or targets == "all-linear":
        return lambda name: name in stored and not left_out(name)
    meant = meaning(targets)
    if isinstance(targets, str) or numbers is None or numbers == []:
        return lambda name: meant(name) and not left_out(name)
    chosen = {numbers} if isinstance(numbers, int) else set(numbers)
    pattern = raw.get("layers_pattern") or [r"[^.]*"]
    patterns = [pattern] if isinstance(pattern, str) else pattern
    return lambda name: meant(name) and not left_out(name) and layer_number(name, patterns) in chosen


def layer_number(name: str, patterns: Iterable[str]) -> int | None:
    """The first number in a module's name that follows one of `patterns`, as 3 in "layers.3.mlp"; or None."""
    parts = name.split(".")
    for pattern in patterns:
        for i, part in enumerate(parts[:-1]):
            if i and part.isdecimal() and matches_whole(rf"(?:.*\.)?(?:{pattern})", ".".join(parts[:i])):
                return int(part)
    return None


def meaning(wanted: str | Iterable[str]) -> Callable[[str], bool]:
    """Does PEFT take a module, by its name, as meant by an expression, or by last parts of names?"""
    if isinstance(wanted, str):
        return lambda name: matches_whole(wanted, name)
    ends = frozenset(wanted)
    return lambda name: any(end in ends for end in last_parts(name))


def last_parts(name: str) -> list[str]:
    """The last parts of a name, from the last one alone to all.

    >>> last_parts("layers.0.mlp")
    ['mlp', '0.mlp', 'layers.0.mlp']
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
