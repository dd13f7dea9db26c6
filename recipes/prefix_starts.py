"""Make data/results/prefix_starts.jsonl: prefix tuning with a fair start, and through an MLP.

    python -m recipes.prefix_starts

The runs of experiments/beyond.toml start a prefix from N(0, 1), PEFT's default, and train it directly. Here it starts
from the keys and values that the model makes of a training passage, or comes out of an MLP that trains (Li and Liang's
reparametrization); everything else is the same: 100 steps of 4 passages of Jane Austen, tiny-llama. Each has its own
learning rates, with one seed; the best is run again with two more. A run that is recorded is not repeated.
"""

import itertools

import torch

from labkit import models
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.data.passages import load_austen
from labkit.lora.count import trainable
from labkit.paths import data_folder
from labkit.sweeps.config import RunConfig
from labkit.sweeps.records import append
from labkit.sweeps.tasks import measure_austen
from labkit.training.loop import train
from recipes import jsonl

LENGTHS, WIDTH = (20, 146), 64
RATES = {"text": (3e-2, 1e-1, 3e-1, 1.0), "mlp": (1e-2, 3e-3, 3e-2, 1e-1)}


def measure(length: int, start: str, lr: float, seed: int) -> dict:
    """One run: its settings and its numbers."""
    config = RunConfig(method="prefix", size=length, steps=100, batch_size=4, lr=lr, seed=seed)
    model, tokenizer = models.load(config.model, torch.float32)
    records = load_austen("train")
    torch.manual_seed(seed)
    if start == "text":
        prefix = PrefixConfig(length, init="text", text=records[seed]["completion"])
    else:
        prefix = PrefixConfig(length, projection=WIDTH)
    add_prefix(model, prefix, tokenizer)
    counted = trainable(model).trainable
    history = train(model, tokenizer, records, config.train_config())
    row = {
        "length": length,
        "start": start,
        "lr": lr,
        "seed": seed,
        "parameters": counted,
        "seconds": round(history.seconds, 1),
    }
    return row | measure_austen(model, tokenizer, config)


def main() -> None:
    path = data_folder() / "results" / "prefix_starts.jsonl"
    with jsonl.resuming(path):
        done = {tuple(row[k] for k in ("length", "start", "lr", "seed")): row for row in jsonl.read(path)}

        def take(*key) -> dict:
            if key not in done:
                done[key] = measure(*key)
                append(path, done[key])
                print(*key, done[key]["validation_loss"], flush=True)
            return done[key]

        for length, (start, rates) in itertools.product(LENGTHS, RATES.items()):
            best = min(rates, key=lambda lr: take(length, start, lr, 0)["validation_loss"])
            for seed in (1, 2):
                take(length, start, best, seed)


if __name__ == "__main__":
    main()
