"""Trained-looking adapters of a real base, in PEFT folders: random, and strong enough to change what is written."""

from pathlib import Path

import torch
from torch import nn

import labkit
from labkit.lora.inject import lora_layers

# ranks, scalings, targets and variants differ; "words" also adapts the embedding
CONFIGS = {
    "support": labkit.LoRAConfig(r=8, alpha=16),
    "sql": labkit.LoRAConfig(r=4, alpha=8, targets=["q_proj", "v_proj"], variant="rslora"),
    "poet": labkit.LoRAConfig(r=16, alpha=8, targets="mlp", rank_pattern={"down_proj": 2}),
    "clerk": labkit.LoRAConfig(r=2, alpha=1, targets="attention", alpha_pattern={"o_proj": 9}),
}


def make_folder(
    model: nn.Module, path: Path, config: labkit.LoRAConfig, seed: int, scale: float = 0.5
) -> Path:
    """The folder of an adapter of `model`, which is left as it was; `scale` is that of its numbers."""
    labkit.add_lora(model, config)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.normal_(std=scale / factor.shape[1] ** 0.5, generator=generator)
    labkit.save_adapter(model, path)
    labkit.remove_adapter(model, "default")
    return path


def make_folders(model: nn.Module, root: Path) -> dict[str, Path]:
    """One folder for each of `CONFIGS`, by name."""
    return {
        name: make_folder(model, root / name, config, seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }
