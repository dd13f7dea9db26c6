"""Faint specimens: nearly well, each with one fault that a single probe can see.

They learn, their loss falls, and their answers are mostly right. Where they are left out, the probes for the origin,
the wiring, the rate and the rounding look as if another probe could do their work.
"""

from pathlib import Path

from labkit.doctor.specimens import (
    LR,
    STEPS,
    Specimen,
    adapted,
    fed_batches,
    put_on,
    teach,
    train_records,
    trained,
    valley_for,
    with_history,
)
from labkit.lora.merging import merge, unload

SLOW = 0.4  # times the rate of a healthy run: below the valley, and still learning
LEFT_OUT = ("q_proj", "k_proj")


def other_merge_below(seed: int, folder: Path) -> Specimen:
    """The adapter on a base into which somebody has merged another adapter: of SQL questions."""
    model, history = trained(seed)
    base = unload(trained(seed, "lora", "sql")[0])
    return with_history(put_on(base, model, folder), history, adapter=folder)


def part_in_optimizer(seed: int, folder: Path) -> Specimen:
    """An optimizer that holds all of the adapter but what is at queries and keys."""
    model = adapted(seed)
    held = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not any(kind in name for kind in LEFT_OUT)
    ]
    history, optimizer = teach(model, fed_batches(train_records(), seed, STEPS), held=held)
    return with_history(model, history, optimizer=optimizer)


def slow(seed: int, folder: Path) -> Specimen:
    """A learning rate a little below the valley."""
    model = adapted(seed)
    history, _ = teach(model, fed_batches(train_records(), seed, STEPS), lr=SLOW * LR)
    return with_history(model, history, valley=valley_for("orders"))


def merged_at_full_size(seed: int, folder: Path) -> Specimen:
    """A healthy QLoRA run, merged into its four bits: about half of the update stays behind."""
    model, history = trained(seed, "qlora")
    return with_history(merge(model, requantize=True), history)
