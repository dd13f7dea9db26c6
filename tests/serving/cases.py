"""Registries, a clock that ticks, and PEFT folders of a small base, written without training."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from labkit.formats.peft_folder import write_folder
from labkit.formats.provenance import record, seal
from labkit.serving.admission import Base
from labkit.serving.registry import Registry

START = datetime(2026, 11, 1, tzinfo=UTC)
MODULES = {
    f"model.layers.{layer}.self_attn.{part}_proj": (8, 8)
    for layer in range(2)
    for part in ("q", "k", "v", "o")
} | {"model.embed_tokens": (32, 8), "lm_head": (8, 32)}


def form(weights: str = "a", kind: str = "torch.float32", shapes: str = "s") -> dict[str, str]:
    """A fingerprint of a base whose weights and shapes are those letters."""
    return {
        "class": "LlamaForCausalLM",
        "shapes": shapes * 64,
        "linears": weights * 64,
        "linears_kind": kind,
        "rest": weights * 64,
        "rest_kind": kind,
    }


BASE = Base("small", (form(), form("b", "torch.bfloat16")), MODULES)


def clock_from(start: datetime = START, step: timedelta = timedelta(minutes=1)) -> Callable[[], datetime]:
    """A clock that says a time one step later each time that it is asked."""
    ticks = iter(range(10**9))
    return lambda: start + next(ticks) * step


def make_registry(root: Path, base: Base = BASE, **others) -> Registry:
    """A new registry, with a clock that ticks minutes."""
    return Registry.create(root, base, **{"clock": clock_from()} | others)


def write_adapter(
    path: Path,
    seed: int = 0,
    base: dict | None = None,
    change: Callable[[dict, dict], None] | None = None,
    width: int = 8,
    **settings,
) -> Path:
    """A PEFT folder of rank 2 for `MODULES`, random by `seed`.

    Args:
        path: of the folder.
        seed: of its numbers.
        base: the fingerprint in its `labkit.json`.
        change: called with its tensors and settings before they are written.
        width: of the layers.
        settings: of `adapter_config.json`.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "small",
        "r": 2,
        "lora_alpha": 4,
    }
    raw |= {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
    } | settings
    tensors = {}
    for name in MODULES:
        if name.rpartition(".")[2] in raw["target_modules"]:
            prefix = f"base_model.model.{name}.lora_"
            tensors[f"{prefix}A.weight"] = torch.randn(raw["r"], width, generator=generator)
            tensors[f"{prefix}B.weight"] = torch.randn(width, raw["r"], generator=generator)
            if raw["use_dora"]:
                tensors[f"{prefix}magnitude_vector"] = torch.rand(width, generator=generator)
    if change is not None:
        change(tensors, raw)
    provenance = record(base or form(), {"r": raw["r"]}, {"train.jsonl": "0" * 64}, {"loss": 1.5})
    return write_folder(path, tensors, raw, seal(provenance, tensors, raw))
