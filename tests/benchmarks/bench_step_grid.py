"""What four bits cost in time, by the number of tokens in a step: full fine-tuning, LoRA and QLoRA of SmolLM2-135M.

Every method takes the same steps on the same random tokens. All of them take one step to warm up; then the
order is drawn anew for each lap, so that a busy moment falls on none of them in particular. The medians are
printed, and with `--record` all laps are kept: data/results/step_times.json.

    python tests/benchmarks/bench_step_grid.py [--laps 7] [--record data/results/step_times.json]
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from labkit import models
from labkit.checks import version_of
from labkit.data.batches import Batch
from labkit.files.writing import new_file
from labkit.hardware import product_dtype
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from labkit.sweeps.processes import hardware
from labkit.training.loss import supervised_loss

GRID = [(1, 16), (1, 64), (2, 96), (4, 96), (8, 96), (16, 96)]  # examples, tokens of each
SUPERVISED = 0.4  # share of a row, as in tickets
RANK = 16


def make_batch(examples: int, tokens: int) -> Batch:
    """Random tokens, of which the last 40 % of each row are supervised."""
    ids = torch.randint(100, 49_000, (examples, tokens), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[:, : -max(1, round(SUPERVISED * tokens))] = -100
    return Batch(ids, targets)


def adapted(base_dtype: torch.dtype = torch.float32, products: torch.dtype | None = None) -> torch.nn.Module:
    """LoRA over a base in `base_dtype`, or in four bits if there is a dtype for its products."""
    model, _ = models.load("smollm2-135m")
    model.to(base_dtype)
    if products is not None:
        quantize_model(model, compute_dtype=products, progress=False)
    return add_lora(model, LoRAConfig(r=RANK, alpha=2 * RANK))


METHODS = {
    "full fine-tuning": lambda: models.load("smollm2-135m")[0],
    "LoRA": adapted,
    "QLoRA": lambda: adapted(products=torch.float32),
}
if product_dtype("cpu") == torch.bfloat16:
    METHODS |= {
        "LoRA, bf16 base": lambda: adapted(torch.bfloat16),
        "QLoRA, bf16 products": lambda: adapted(products=torch.bfloat16),
    }


def make_step(make: Callable[[], torch.nn.Module]) -> Callable[[Batch], None]:
    """A function that takes one training step."""
    model = make().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(batch: Batch) -> None:
        (supervised_loss(model, batch) / batch.n_supervised).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_grid(laps: int) -> list[dict]:
    """A row per method and number of tokens: the seconds of each lap."""
    steps = {name: make_step(make) for name, make in METHODS.items()}
    rows, draw = [], random.Random(0)
    for examples, tokens in GRID:
        batch = make_batch(examples, tokens)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step(batch)
        for _ in range(laps):
            for name in draw.sample(list(steps), len(steps)):
                started = time.perf_counter()
                steps[name](batch)
                seconds[name].append(round(time.perf_counter() - started, 4))
        rows += [
            {"method": name, "tokens": examples * tokens, "seconds": laps} for name, laps in seconds.items()
        ]
        medians = {name: statistics.median(laps) for name, laps in seconds.items()}
        shown = "  ".join(
            f"{name} {value:.2f} s ({value / medians['LoRA']:.2f}×)" for name, value in medians.items()
        )
        print(f"{examples * tokens:5} tokens: {shown}", flush=True)
    return rows


def main(description: str, measure: Callable[[int], list[dict]], laps: int) -> None:
    """The command line: measure, and keep the rows with what they were measured on."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--laps", type=int, default=laps)
    parser.add_argument("--record", type=Path, help="keep all laps in this file")
    chosen = parser.parse_args()
    rows = measure(chosen.laps)
    if chosen.record:
        about = {
            "command": f"python tests/benchmarks/{Path(sys.argv[0]).name} --record {chosen.record}",
            "model": "smollm2-135m",
            "hardware": hardware(),
            "versions": {name: version_of(name) for name in ("labkit", "torch", "transformers")},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with new_file(chosen.record) as part:
            part.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(__doc__, measure_grid, laps=7)
