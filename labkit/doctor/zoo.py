"""The specimens by name, and the probe that should find each first."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from labkit.data.facts import make_facts
from labkit.doctor.faint import merged_at_full_size, other_merge_below, part_in_optimizer, slow
from labkit.doctor.specimens import (
    LABELS,
    LR,
    STEPS,
    VARIANTS,
    Specimen,
    adapted,
    fed_batches,
    healthy,
    held_records,
    put_on,
    spoiled_labels,
    teach,
    tiny_llama,
    train_records,
    trained,
    valley_for,
    with_history,
)
from labkit.formats.adapters import save_adapter
from labkit.lora.inject import lora_layers
from labkit.lora.merging import merge


def checkpointing(seed: int, folder: Path, steps: int) -> Specimen:
    """Reentrant checkpointing by hand, with no input that requires a gradient: the blocks get none."""
    model = adapted(seed)
    for block in model.model.layers:
        block.forward = functools.partial(recomputed, block, block.forward)
    history, _ = teach(model, fed_batches(train_records(), seed, steps))
    return with_history(model, history)


def recomputed(block: nn.Module, forward: Callable, hidden: Tensor, **rest):
    """The output of a block, of which nothing is kept for the backward pass of training."""
    if not block.training:
        return forward(hidden, **rest)
    return checkpoint(lambda hidden: forward(hidden, **rest), hidden, use_reentrant=True)


def frozen(seed: int, folder: Path, steps: int) -> Specimen:
    """Something froze the adapter after it was added; the loop goes on all the same."""
    model = adapted(seed)
    held = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    history, optimizer = teach(model, fed_batches(train_records(), seed, steps), held=held)
    return with_history(model, history, optimizer=optimizer)


def other_optimizer(seed: int, folder: Path, steps: int) -> Specimen:
    """The optimizer was made before the adapter, and holds the tensors of the base."""
    model = adapted(seed)
    held = [p for p in model.parameters() if not p.requires_grad]
    history, optimizer = teach(model, fed_batches(train_records(), seed, steps), held=held)
    return with_history(model, history, optimizer=optimizer)


def few_targets(seed: int, folder: Path) -> Specimen:
    """A regular expression for the targets that matches one block only."""
    model = adapted(seed, targets=r".*\.1\..*q_proj")
    history, _ = teach(model, fed_batches(train_records(), seed, STEPS))
    return with_history(model, history)


def other_template(seed: int, folder: Path) -> Specimen:
    """The server puts an instruction around the message that training did not have."""
    one = healthy(seed, "lora")
    one.given["served"] = [f"### Instruction:\n{record['prompt']}\n### Response:\n" for record in one.data]
    return one


def doubled_start(seed: int, folder: Path) -> Specimen:
    """Prompts that begin with the start token, to which the server adds another."""
    one = healthy(seed, "lora")
    start = one.tokenizer.bos_token
    one.data = [record | {"prompt": start + record["prompt"]} for record in one.data]
    bos = one.tokenizer.bos_token_id
    one.given["served"] = [[bos, *one.tokenizer(record["prompt"])["input_ids"]] for record in one.data]
    del one.given["fed"]
    return one


def at_rate(times: float) -> Callable[[int, Path], Specimen]:
    """A run at another learning rate."""

    def breed_one(seed: int, folder: Path) -> Specimen:
        model = adapted(seed)
        history, _ = teach(model, fed_batches(train_records(), seed, STEPS), lr=LR * times)
        return with_history(model, history, valley=valley_for("orders"))

    return breed_one


def large_alpha(seed: int, folder: Path) -> Specimen:
    """Alpha raised 64 times, and the learning rate left as it was; of an unknown run."""
    model = adapted(seed, alpha=1024)
    teach(model, fed_batches(train_records(), seed, STEPS))
    return with_history(model)


def low_rank(seed: int, folder: Path) -> Specimen:
    """Rank 1 at one kind of layer, for thousands of facts that have nothing in common."""
    facts = make_facts(4000, seed)
    model = adapted(seed, r=1, targets=["q_proj"])
    history, _ = teach(model, fed_batches(facts[:200], seed, 2 * STEPS), lr=LR)
    return Specimen(model, tiny_llama()[1], facts, {"history": history})


def half_precision(seed: int, folder: Path, steps: int) -> Specimen:
    """Adapter and base in fp16, where Adam's eps is zero."""
    model = adapted(seed).half()
    history, _ = teach(model, fed_batches(train_records(), seed, steps))
    return with_history(model, history)


def stalled(seed: int, folder: Path, steps: int) -> Specimen:
    """The adapter in bf16, at a rate that full fine-tuning would take."""
    model = adapted(seed).to(torch.bfloat16)
    history, _ = teach(model, fed_batches(train_records(), seed, steps), lr=2e-5)
    return with_history(model, history)


def coarse_merge(seed: int, folder: Path) -> Specimen:
    """A small update over 4 bits, merged into them: it does not reach the next level."""
    model, _ = trained(seed, "qlora")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.mul_(0.1)
    return with_history(merge(model, requantize=True))


def overfit(seed: int, folder: Path) -> Specimen:
    """Eight records, ten times over."""
    train = train_records()[:8]
    model = adapted(seed)
    history, _ = teach(model, fed_batches(train, seed, 3 * STEPS // 2))
    given = {"history": history, "held_out": held_records()}
    return Specimen(model, tiny_llama()[1], train, given)


def leaked(seed: int, folder: Path) -> Specimen:
    """A tenth of the held-out records was trained on."""
    one = healthy(seed, "lora")
    held = one.given["held_out"]
    one.given["held_out"] = held + one.data[: max(1, len(held) // 10)]
    return one


def other_base(seed: int) -> nn.Module:
    """A model of the same shape: tiny-llama with its blocks in another order."""
    model = copy.deepcopy(tiny_llama()[0])
    blocks = model.model.layers
    weights = [copy.deepcopy(block.state_dict()) for block in blocks]
    for i, block in enumerate(blocks):
        block.load_state_dict(weights[(i + 1 + seed) % len(blocks)])
    return model


def wrong_base(recorded: bool) -> Callable[[int, Path], Specimen]:
    """The adapter on another base of the same shape; with a record of its own base in the folder, or without."""

    def breed_one(seed: int, folder: Path) -> Specimen:
        model = put_on(other_base(seed % 2), trained(seed)[0], folder, recorded)
        return with_history(model, adapter=folder)

    return breed_one


def no_key_matched(seed: int, folder: Path) -> Specimen:
    """A loader that found none of the folder's names in the model, and said nothing."""
    model, _ = trained(seed)
    save_adapter(model, folder)
    return with_history(adapted(seed), adapter=folder)


def lost_root(seed: int, folder: Path) -> Specimen:
    """An rsLoRA adapter loaded by a stack that scales by alpha / r."""
    model, _ = trained(seed, "rslora")
    save_adapter(model, folder)
    for layer in lora_layers(model).values():
        layer.scaling /= math.sqrt(layer.r)
    return with_history(model, adapter=folder)


def stale_cache(seed: int, folder: Path) -> Specimen:
    """A prefix cache that is found by its text alone, whatever adapter computed it."""
    model, history = trained(seed)
    forward = model.forward
    kept: dict[tuple[int, ...], Any] = {}

    def remembering(input_ids=None, past_key_values=None, use_cache=None, **rest):
        out = forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **rest)
        if use_cache and past_key_values is None:
            key = tuple(input_ids.flatten().tolist())
            out.past_key_values = copy.deepcopy(kept.setdefault(key, copy.deepcopy(out.past_key_values)))
        return out

    model.forward = remembering
    return with_history(model, history)


def base_as_reference(seed: int, folder: Path) -> Specimen:
    """Preference training about to start from an adapter, with the base as its reference."""
    model, _ = trained(seed)
    return with_history(model, reference="base")


def unlearned_end(seed: int, folder: Path) -> Specimen:
    """A run without end marks, of which nobody kept the labels."""
    one = spoiled_labels("end mark masked", seed)
    del one.given["fed"]
    return one


def labels(name: str) -> Callable[[int, Path, int], Specimen]:
    """Steps over spoiled labels."""
    return lambda seed, folder, steps: spoiled_labels(name, seed, steps)


# what is wrong with these shows after a few steps, so they take as many as they are asked to
FROM_THE_START: dict[str, tuple[str, Callable[[int, Path, int], Specimen]]] = {
    **{name: ("labels", labels(name)) for name in LABELS},
    "checkpointing trains nothing": ("training", checkpointing),
    "adapter frozen": ("training", frozen),
    "optimizer of other tensors": ("training", other_optimizer),
    "fp16 all the way": ("precision", half_precision),
    "stalled in bf16": ("precision", stalled),
}
AFTER_A_RUN: dict[str, tuple[str, Callable[[int, Path], Specimen]]] = {
    "targets match one block": ("training", few_targets),
    "other template at serving": ("template", other_template),
    "doubled start token": ("template", doubled_start),
    "learning rate times 10": ("rate", at_rate(10)),
    "learning rate by 10": ("rate", at_rate(0.1)),
    "alpha times 64": ("size", large_alpha),
    "rank too low": ("size", low_rank),
    "merged into 4 bits": ("precision", coarse_merge),
    "overfit": ("generalization", overfit),
    "test leaked into train": ("generalization", leaked),
    "other base": ("origin", wrong_base(recorded=True)),
    "other base, no record": ("effect", wrong_base(recorded=False)),
    "no key matched": ("origin", no_key_matched),
    "rsLoRA without its root": ("origin", lost_root),
    "stale cache": ("cache", stale_cache),
    "base as reference": ("reference", base_as_reference),
    "end never learned": ("stopping", unlearned_end),
    "adapter merged below": ("origin", other_merge_below),
    "optimizer of a part": ("training", part_in_optimizer),
    "learning rate times 0.4": ("rate", slow),
    "QLoRA merged into 4 bits": ("precision", merged_at_full_size),
}
SICK = {name: probe for name, (probe, _) in (FROM_THE_START | AFTER_A_RUN).items()}
HEALTHY = tuple(f"healthy {variant}" for variant in VARIANTS)


def breed(name: str, seed: int, folder: Path, steps: int = 3) -> Specimen:
    """The specimen with this name.

    Args:
        name: a key of `SICK` or one of `HEALTHY`.
        seed: of the adapter and the order of the records.
        folder: where an adapter may be saved; it must not exist.
        steps: of those in `FROM_THE_START`; the others need a whole run.
    """
    if name in HEALTHY:
        return healthy(seed, name.removeprefix("healthy "))
    if name in FROM_THE_START:
        return FROM_THE_START[name][1](seed, folder, steps)
    return AFTER_A_RUN[name][1](seed, folder)


def expected(name: str) -> str | None:
    """The probe that should be the first to find it; None of a healthy run."""
    return SICK.get(name)
