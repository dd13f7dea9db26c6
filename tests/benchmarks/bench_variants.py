"""One training step of LoRA, DoRA and QDoRA, here and by PEFT, on the same model, batch and ranks.

Within a group all methods alternate in one run, so that a busy machine slows all of them; medians and their ratios to PEFT are
printed. "all logits" is the like-for-like comparison: PEFT's loss makes the logits of every position. Here only those of the
completion are needed, which is the second row. Each method also takes three steps in a process of its own, for the peak of its
resident memory above that after the imports (see `bench_train_step.py`).

The losses of the last step stand beside the times: ours and PEFT's begin with other random A, so that they are close, not equal.

    python tests/benchmarks/bench_variants.py [--only time|memory] [--rounds 5] [--groups LoRA DoRA QDoRA] [--model smollm2-135m]
"""

import argparse
import sys
from functools import partial

import torch
from bench_train_step import (
    BATCH,
    RANK,
    SUPERVISED,
    TOKENS,
    make_batch,
    peak_memory,
    peaks,
    put_in_bitsandbytes,
    times,
    verdict,
)

from labkit import models
from labkit.data.batches import Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.training.loss import supervised_loss

BOUNDS = {  # what the course promises, relative to PEFT
    "LoRA, labkit, all logits": 1.0,
    "LoRA, labkit": 0.85,
    "DoRA, labkit, all logits": 0.8,
    "DoRA, labkit": 0.8,
    "QDoRA, labkit": 0.8,
}


def ours(name: str, variant: str, logits: str, quantized: bool = False):
    model, _ = models.load(name)
    (add_qlora if quantized else add_lora)(model, LoRAConfig(r=RANK, alpha=32, variant=variant))
    model.train()
    return model, lambda batch: supervised_loss(model, batch, logits) / batch.n_supervised


def peers(name: str, dora: bool, quantized: bool = False):
    from peft import LoraConfig, get_peft_model

    model, _ = models.load(name)
    if quantized:
        put_in_bitsandbytes(model).is_loaded_in_4bit = True
    config = LoraConfig(
        r=RANK, lora_alpha=32, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config).train()
    return model, lambda batch: model(input_ids=batch.ids, labels=batch.targets, use_cache=False).loss


GROUPS = {
    "LoRA": {
        "LoRA, PEFT": lambda m: peers(m, dora=False),
        "LoRA, labkit, all logits": lambda m: ours(m, "lora", "all"),
        "LoRA, labkit": lambda m: ours(m, "lora", "supervised"),
    },
    "DoRA": {
        "DoRA, PEFT": lambda m: peers(m, dora=True),
        "DoRA, labkit, all logits": lambda m: ours(m, "dora", "all"),
        "DoRA, labkit": lambda m: ours(m, "dora", "supervised"),
        "LoRA, for comparison": lambda m: ours(m, "lora", "supervised"),
    },
    "QDoRA": {
        "QDoRA, PEFT + bnb": lambda m: peers(m, dora=True, quantized=True),
        "QDoRA, labkit": lambda m: ours(m, "dora", "supervised", quantized=True),
    },
}


def makers_of(group: str, name: str) -> dict:
    """The methods of a group, on the model `name`."""
    return {method: partial(maker, name) for method, maker in GROUPS[group].items()}


def batch_for(name: str) -> Batch:
    """The batch of `bench_train_step`, its ids within the model's vocabulary."""
    batch = make_batch()
    vocabulary = 4096 if name == "tiny-llama" else 49_152
    targets = torch.where(batch.targets < 0, batch.targets, batch.targets % vocabulary)
    return Batch(batch.ids % vocabulary, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS))
    parser.add_argument("--model", default="smollm2-135m", help="or tiny-llama, for a quick look")
    parser.add_argument("--peak", nargs=2, help="internal: print the peak memory of one method of a group")
    arguments = parser.parse_args()
    if arguments.peak:
        group, method = arguments.peak
        peak_memory(makers_of(group, arguments.model)[method], lambda: batch_for(arguments.model), steps=3)
        return
    threads = torch.get_num_threads()
    print(
        f"{arguments.model}: {BATCH} × {TOKENS} tokens, {SUPERVISED} supervised, r={RANK}, {threads} threads"
    )
    for group, methods in ((group, GROUPS[group]) for group in arguments.groups):
        peer = next(iter(methods))
        if arguments.only != "time":
            command = [sys.executable, __file__, "--model", arguments.model, "--peak", group]
            peak = peaks(command, methods)
            for method in methods:
                ratio = peak[method] / peak[peer]
                print(
                    f"{method:26} peak {peak[method]:6.0f} MB ({ratio:.2f}×){verdict(BOUNDS.get(method), ratio)}",
                    flush=True,
                )
        if arguments.only != "memory":
            runs = times(makers_of(group, arguments.model), batch_for(arguments.model), arguments.rounds)
            for method, run in runs.items():
                ratio = run.median / runs[peer].median
                print(
                    f"{method:26} median {run.median:6.3f} s ({ratio:.2f}×), fastest {min(run.seconds):6.3f} s, "
                    f"loss {run.loss:.4f}{verdict(BOUNDS.get(method), ratio)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
