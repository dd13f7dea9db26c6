"""A registry of adapters of SmolLM2-135M, and what else the engines are given: files for llama.cpp, and misfits.

    tickets              the one that comes with the course, trained over the base in four bits
    sql, prose           trained here for `STEPS` steps: LoRA on questions to databases, rsLoRA on novels
    random-01 …          never trained: random numbers, strong enough to change every answer; for counting tokens a second
    support@v1, @v2      tickets and sql under one name, whose alias moves

All are of rank 16 on all linear layers, so each costs an engine the same.
"""

import copy
from pathlib import Path

import torch
from torch import nn

import labkit
from labkit import models
from labkit.data.passages import load_austen
from labkit.data.sql import load_questions, sql_record
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.lora.inject import lora_layers
from labkit.paths import data_folder
from labkit.quant.model import quantize_model
from labkit.serving.admission import Base
from labkit.serving.registry import Registry

BASE = "smollm2-135m"
STEPS = 20
RANDOM = 13
NAMES = ("tickets", "sql", "prose", *(f"random-{i:02}" for i in range(1, RANDOM + 1)))
RSLORA = "prose"
STRENGTH = 0.02  # standard deviation of a random B


def base_model() -> tuple[nn.Module, object]:
    """SmolLM2-135M in fp32, and its tokenizer."""
    return models.load(BASE, dtype="float32", device="cpu")


def make_all(work: Path) -> Registry:
    """Make what is not yet there, below `work`; the registry."""
    for name in NAMES[1:]:
        if not (work / "adapters" / name).exists():
            make_adapter(name, work / "adapters" / name)
    if not (work / "misfits" / "other-weights").exists():
        make_misfits(work / "misfits")
    if not (work / "gguf" / "base.gguf").exists():
        make_gguf(work)
    return registry(work)


def folder(work: Path, name: str) -> Path:
    """Where the PEFT folder of an adapter is."""
    return data_folder() / "adapters" / "tickets" if name == "tickets" else work / "adapters" / name


def make_adapter(name: str, path: Path) -> None:
    """Train or draw one adapter."""
    model, tokenizer = base_model()
    config = labkit.LoRAConfig(r=16, alpha=32)
    if name == RSLORA:
        config = labkit.LoRAConfig(r=16, alpha=16, variant="rslora")  # scaled by 4; read as LoRA, by 1
    torch.manual_seed(NAMES.index(name))
    labkit.add_lora(model, config)
    if name in ("sql", "prose"):
        records = (
            [sql_record(item) for item in load_questions("train")] if name == "sql" else load_austen("train")
        )
        labkit.train(
            model,
            tokenizer,
            records,
            labkit.TrainConfig(steps=STEPS, batch_size=4, max_length=256, progress=False),
        )
    else:
        for layer in lora_layers(model).values():
            layer.lora_B.data.normal_(std=STRENGTH)
    labkit.save_adapter(model, path)


def make_misfits(path: Path) -> None:
    """Adapters of other bases: `other-shape` of tiny-llama, and `other-weights` of a SmolLM2 that was trained on."""
    tiny, _ = models.load("tiny-llama", dtype="float32", device="cpu")
    changed, _ = base_model()
    with torch.no_grad():  # as a full fine-tune would leave it: all shapes the same, no weight
        for parameter in changed.parameters():
            parameter.mul_(
                1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    for name, model in (("other-shape", tiny), ("other-weights", changed)):
        torch.manual_seed(0)
        labkit.add_lora(model, labkit.LoRAConfig(r=16, alpha=32))
        for layer in lora_layers(model).values():
            layer.lora_B.data.normal_(std=STRENGTH)
        labkit.save_adapter(model, path / name)
        save_gguf_adapter(model, path / f"{name}.gguf")


def make_gguf(work: Path) -> None:
    """The adapters and the base as GGUF files; the base last, as it says that all are there."""
    model, tokenizer = base_model()
    (work / "gguf").mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        adapted = copy.deepcopy(model)
        if name == "tickets":  # its own base is the one in four bits; the numbers of the adapter are the same
            quantize_model(adapted, progress=False)
        labkit.load_adapter(adapted, folder(work, name))
        save_gguf_adapter(adapted, work / "gguf" / f"{name}.gguf")
    save_gguf(model, tokenizer, work / "gguf" / "base.gguf", "F32")


def registry(work: Path) -> Registry:
    """The registry below `work`; it is made, and all adapters published, unless it is there."""
    place = work / "registry"
    if place.exists():
        return Registry(place)
    model, _ = base_model()
    four_bit = copy.deepcopy(model)
    quantize_model(four_bit, progress=False)
    made = Registry.create(place, Base.of(BASE, model, four_bit))
    for name in NAMES:
        made.publish(name, folder(work, name), owner="lab")
        made.set_alias(f"{name}@production", 1)
    for name in ("tickets", "sql"):
        made.publish("support", folder(work, name), owner="lab")
    made.set_alias("support@production", 1)
    return made
