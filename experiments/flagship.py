"""The flagship's training run again, with other seeds and one thing changed at a time.

    python -m experiments.flagship                     all runs that are not recorded yet
    python -m experiments.flagship --only qlora lora   of these variants only

One run is five to ten minutes on one CPU core. Each adds one line of JSON to `data/results/flagship.jsonl` when it is
done; a run that is recorded there is not done again, and one that was killed leaves nothing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

import labkit
from labkit import evaluate, models
from labkit.data import encode_all, fingerprint, ticket_chat, tickets
from labkit.hardware import product_dtype

RESULTS = Path(__file__).parents[1] / "data" / "results" / "flagship.jsonl"
SEEDS = (0, 1, 2)
ADAPTER = labkit.LoRAConfig(r=16, alpha=32, targets="all-linear")
TRAINING = labkit.TrainConfig(lr=2e-3, epochs=1.0, batch_size=2)

# what differs from the flagship, which is the first
VARIANTS = {
    "qlora": {},
    "qlora, batch 1": {"batch_size": 1, "lr": 1e-3},
    "lora": {"quantized": False},
    "qlora, dropout 0.1": {"dropout": 0.1},
    "qlora, clip 0.3": {"clip": 0.3},
    "qlora, bf16 adapter": {"adapter_dtype": torch.bfloat16},
}


def run(variant: str, seed: int) -> dict:
    """Train one variant with one seed (of A's start, the order of the data, and dropout), and measure it on held-out data."""
    changes = VARIANTS[variant]
    model, tokenizer = models.load("smollm2-135m", dtype=torch.float32, device="cpu")
    if changes.get("quantized", True):
        labkit.quantize_model(model, compute_dtype=product_dtype("cpu"), progress=False)
    torch.manual_seed(seed)
    labkit.add_lora(model, replace(ADAPTER, dropout=changes.get("dropout", 0.0)))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(changes.get("adapter_dtype", torch.float32))
    train, validation, test = (
        [ticket_chat(t) for t in tickets(split)] for split in ("train", "validation", "test")
    )
    training = replace(TRAINING, seed=seed, **{k: v for k, v in changes.items() if hasattr(TRAINING, k)})
    history = labkit.train(model, tokenizer, train, training)
    loss, tokens = evaluate.held_out_loss(model, tokenizer, validation)
    scores = {}
    for split, chats in (("validation", validation), ("test", test)):
        answers = evaluate.generate(
            model, tokenizer, evaluate.chat_prompts(chats, tokenizer), max_new_tokens=52
        )
        scores[split] = evaluate.score_json(answers, [t["label"] for t in tickets(split)])
    norms = [row["grad_norm"] for row in history.steps]
    return {
        "variant": variant,
        "seed": seed,
        "exact_match": scores["test"].exact_match,
        "per_field": scores["test"].per_field,
        "validation_exact_match": scores["validation"].exact_match,
        "held_out_loss": loss,
        "held_out_tokens": tokens,
        "train_loss_last_50": sum(history.losses[-50:]) / 50,
        "largest_loss_after_10": max(history.losses[10:]),
        "share_of_steps_with_norm_above_0.3": sum(norm > 0.3 for norm in norms) / len(norms),
        "steps": len(history.steps),
        "seconds": history.seconds,
        "data": fingerprint(encode_all(train, tokenizer, training.max_length)[0]),
        "lr": training.lr,
        "products": str(product_dtype("cpu")).removeprefix("torch.")
        if changes.get("quantized", True)
        else "float32",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "machine": f"{platform.machine()}, {torch.cpu.get_capabilities().get('cpu_name', 'unknown')}",
        "date": time.strftime("%Y-%m-%d"),
    }


def recorded() -> list[dict]:
    """The lines of the results file. A last line that was cut off by a kill is left out."""
    if not RESULTS.exists():
        return []
    lines = RESULTS.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is no whole line


def record(result: dict) -> None:
    """Add a line: the whole file is written anew and renamed, so that no kill can cut it."""
    part = RESULTS.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in [*recorded(), result]))
    os.replace(part, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    only = parser.parse_args().only
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for variant in only:
            if (variant, seed) in {(row["variant"], row["seed"]) for row in recorded()}:
                continue
            result = run(variant, seed)
            record(result)
            print(
                f"{variant}, seed {seed}: exact match {result['exact_match']:.0%}, loss {result['held_out_loss']:.4f}"
            )


if __name__ == "__main__":
    main()
