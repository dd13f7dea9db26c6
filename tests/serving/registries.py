"""A registry of tiny-llama with two adapters and their aliases, and what each name writes."""

from pathlib import Path
from typing import Any

import torch

import labkit
from labkit import models
from labkit.serving.admission import Base
from labkit.serving.registry import Registry
from tests.serving.adapters import CONFIGS, make_folder

PROMPT = "The old lamp"
FOLDERS = {"support@v1": "one", "support@v2": "two", "sql@v1": "sql"}
ALIASES = {"support@production": "support@v1", "support@staging": "support@v2", "sql@production": "sql@v1"}


def make_served_registry(root: Path) -> Registry:
    """Versions from folders in `root`, and aliases, as above."""
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    registry = Registry.create(root / "registry", Base.of("tiny-llama", model))
    for seed, (label, folder) in enumerate(FOLDERS.items()):
        name = label.partition("@")[0]
        make_folder(model, root / folder, CONFIGS[name], seed)
        registry.publish(name, root / folder, "ann")
    for alias, label in ALIASES.items():
        registry.set_alias(alias, int(label[-1]))
    return registry


def written_alone(root: Path, tokens: int = 12) -> dict[str, str]:
    """What transformers writes after `PROMPT`, for the base and each version, with its adapter alone in a model."""
    made = {}
    for name, folder in {"tiny-llama": None, **FOLDERS}.items():
        model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
        if folder is not None:
            labkit.load_adapter(model, root / folder)
        made[name] = generate(model, tokenizer, tokens)
    return made


def generate(model: Any, tokenizer: Any, tokens: int) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
