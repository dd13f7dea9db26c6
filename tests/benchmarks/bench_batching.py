"""What packing saves in time: an epoch of tickets in padded batches, drawn at random or by length, and in packed rows.

QLoRA of SmolLM2-135M on the same 32 tickets, by the number of examples in a batch. After one step of each to warm up, the order of
the ways is drawn anew for each lap, so that a busy moment falls on none of them in particular. The medians
are printed, and with `--record` all laps are kept: data/results/batching_times.json.

    python tests/benchmarks/bench_batching.py [--laps 5] [--record data/results/batching_times.json]
"""

import random
import statistics
import time

from bench_step_grid import adapted, main, make_step

from labkit import models
from labkit.data.batches import Batch, batch_order, make_batch_of
from labkit.data.encoding import Encoded, encode
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.hardware import product_dtype

BATCHINGS = ("shuffled", "similar", "packed")
SIZES = (4, 16)
TICKETS = 32


def epoch(examples: list[Encoded], size: int, batching: str, pad_id: int) -> list[Batch]:
    """The batches of one pass."""
    order = batch_order([len(one) for one in examples], size, 0, 0, batching)
    return [make_batch_of([examples[i] for i in chosen], pad_id, batching) for chosen in order]


def measure_epochs(laps: int) -> list[dict]:
    """A row per way and size of batch: positions in an epoch, and its seconds in each lap."""
    _, tokenizer = models.load("smollm2-135m")
    examples = [encode(ticket_chat(ticket), tokenizer) for ticket in load_tickets("train")[:TICKETS]]
    step = make_step(lambda: adapted(products=product_dtype("cpu")))
    rows, draw = [], random.Random(0)
    for size in SIZES:
        batches = {name: epoch(examples, size, name, tokenizer.pad_token_id) for name in BATCHINGS}
        seconds: dict[str, list[float]] = {name: [] for name in BATCHINGS}
        for of_name in batches.values():
            step(of_name[0])
        for _ in range(laps):
            for name in draw.sample(BATCHINGS, len(BATCHINGS)):
                started = time.perf_counter()
                for batch in batches[name]:
                    step(batch)
                seconds[name].append(round(time.perf_counter() - started, 3))
        for name, values in seconds.items():
            positions = sum(batch.ids.numel() for batch in batches[name])
            rows.append({"batching": name, "batch_size": size, "positions": positions, "seconds": values})
            ratio = statistics.median(values) / statistics.median(seconds["packed"])
            print(
                f"batch {size:2} {name:8} {positions:5} positions: {statistics.median(values):.2f} s ({ratio:.2f}× packed)",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main(__doc__, measure_epochs, laps=5)
