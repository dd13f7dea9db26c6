"""Make data/results/serving_costs.jsonl: what a step of decoding costs over many adapters, and what a change of adapter does.

    python -m recipes.serving_costs
    python -m recipes.serving_costs --groups machine "smollm2-135m fp32" --laps 5

A line for each measurement, with the seconds of every lap. All that one group measures takes turns, in an order that is drawn
anew for each lap, so that a busy moment falls on none of them in particular; the first lap warms up and is left out.

    machine     GB/s that a sum over 1 GiB reads, GB/s of the library's matrix-vector product, GFLOP/s of products of
                matrices, and seconds that a call takes
    sizes       W, P, a, P_a and L of each model (`labkit.serving.costs`), counted
    step        one token for each of `batch` rows, 32 tokens in the cache, `distinct` adapters of rank 16 on all linear
                layers, dealt to the rows in turn. "ours" is an `AdapterBank` ("base" where distinct is 0), "copies" merged copies
                one after another, "PEFT" its `adapter_names`
    prices      see `recipes.serving_prices`

"others" is how many processors other processes kept busy meanwhile: near 0, or the seconds are not this machine's.

A merged copy is the base's own modules in as much memory of its own. Two of SmolLM2's answer in turns for however many:
each is far larger than the caches, so reading it again takes as long as reading another. Kill it when you like: it goes
on with the group where it was. Under two minutes for each group.
"""

import argparse
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import labkit
from labkit import models
from labkit.checks import version_of
from labkit.lora.inject import lora_layers
from labkit.paths import data_folder
from labkit.serving.batched import AdapterBank
from labkit.serving.costs import count_sizes, deal
from labkit.sweeps.processes import hardware
from labkit.sweeps.records import append
from recipes import jsonl

RESULTS = "results/serving_costs.jsonl"
RANK, PAST = 16, 32  # tokens in the cache
BATCHES = (1, 8, 16, 64)
PEFT_BATCH, PEFT_DISTINCT = 16, (1, 4, 16)
COPIES = {
    "smollm2-135m": 2,
    "tiny-llama": 16,
}  # in memory; those of tiny-llama together are larger than the caches
MOST_COPIES = 16  # one after another: more take as many times as long
GROUPS = ("machine", "smollm2-135m fp32", "smollm2-135m nf4", "tiny-llama fp32", "prices")


def load(name: str, numbers: str = "fp32") -> nn.Module:
    """A base in fp32, or with its linear layers in NF4."""
    model = models.load(name, dtype=torch.float32)[0].eval().requires_grad_(False)
    if numbers == "nf4":
        labkit.quantize_model(model, progress=False)
    return model


def make_folder(model: nn.Module, folder: Path) -> Path:
    """The PEFT folder of an adapter with random numbers for `model`, which is left as it was."""
    labkit.add_lora(model, labkit.LoRAConfig(r=RANK))
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.02, generator=generator)
    labkit.save_adapter(model, folder)
    labkit.remove_adapter(model, "default")
    return folder


def in_turns(work: dict, laps: int) -> dict:
    """Seconds of each, lap by lap, without the first; the order of a lap is drawn."""
    draw, seconds = random.Random(0), {key: [] for key in work}
    for lap in range(laps + 1):
        for key in draw.sample(list(work), len(work)):
            taken = timed(work[key])
            if lap:
                seconds[key].append(taken)
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 7)


def distinct_up_to(batch: int) -> list[int]:
    """0, 1, 2, 4 … of so many rows."""
    return [0, *(1 << i for i in range(batch.bit_length()))]


class Decoding:
    """Rows with a text in the cache, of which a model writes one token more, any number of times."""

    def __init__(self, model: nn.Module, rows: int):
        self.ids = torch.randint(0, 4000, (rows, PAST + 1), generator=torch.Generator().manual_seed(0))
        self.cache = DynamicCache()
        model(input_ids=self.ids[:, :PAST], past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self, model: Callable[..., object], **options) -> None:
        """One token for each row."""
        model(input_ids=self.ids[:, PAST:], past_key_values=self.cache, use_cache=True, **options)
        self.cache.crop(-1)


def of_bank(decoding: Decoding, bank: AdapterBank, rows: list[str]) -> None:
    with bank.rows(rows):
        decoding.step(bank.model)


def of_copies(decodings: list[tuple[Decoding, nn.Module]]) -> None:
    for decoding, model in decodings:
        decoding.step(model)


def peft_of(model: nn.Module, folder: Path, names: list[str]) -> nn.Module:
    """The same adapters in PEFT."""
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(model, folder, adapter_name=names[0]).eval()
    for name in names[1:]:
        theirs.load_adapter(folder, name)
    return theirs


def steps(name: str, numbers: str, laps: int) -> Iterator[dict]:
    """The lines of one model."""
    bank, is_whole = AdapterBank(load(name, numbers)), numbers == "fp32"
    sizes = asdict(count_sizes(bank.model, RANK))
    yield {"figure": "sizes", "model": name, "numbers": numbers, "r": RANK} | sizes
    batches = BATCHES if is_whole else (PEFT_BATCH,)
    names = [f"a{i}" for i in range(max(batches))]
    work: dict[tuple, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(load(name), Path(place) / "adapter")
        for one in names:  # the same numbers, in memory of their own
            bank.load(folder, one)
        theirs = peft_of(load(name), folder, names[: max(PEFT_DISTINCT)]) if is_whole else None
    copies = [load(name) for _ in range(COPIES[name])] if is_whole else []
    for batch in batches:
        decoding = Decoding(bank.model, batch)
        for n in distinct_up_to(batch) if is_whole else (0, *PEFT_DISTINCT):
            rows = [names[i % n] if n else None for i in range(batch)]
            work[batch, n, "ours" if n else "base"] = partial(of_bank, decoding, bank, rows)
            if copies and 0 < n <= MOST_COPIES:
                split = [
                    (Decoding(copies[0], b), copies[i % len(copies)]) for i, b in enumerate(deal(batch, n))
                ]
                work[batch, n, "copies"] = partial(of_copies, split)
            if theirs is not None and batch == PEFT_BATCH and n in PEFT_DISTINCT:
                work[batch, n, "PEFT"] = partial(decoding.step, theirs, adapter_names=rows)
    for (batch, n, how), seconds in in_turns(work, laps).items():
        yield {
            "figure": "step",
            "model": name,
            "numbers": numbers,
            "batch": batch,
            "distinct": n,
            "how": how,
            "seconds": seconds,
        }


def machine(laps: int) -> Iterator[dict]:
    """What the roofline needs to know."""
    numbers = torch.ones(1 << 28)  # 1 GiB
    matrix, vector = numbers.view(1 << 16, 1 << 12), torch.ones(1 << 12)
    a, b = torch.randn(2, 2048, 2048)
    skinny = torch.randn(16, 576), torch.randn(1536, 576).T
    one, calls = torch.ones(1), 1000

    def call() -> Tensor:
        for _ in range(calls):
            one.add_(1)
        return one

    seconds = in_turns(
        {
            "sum": numbers.sum,
            "matrix-vector": lambda: torch.mv(matrix, vector),
            "matrix-matrix": lambda: a @ b,
            "sixteen rows": lambda: [skinny[0] @ skinny[1] for _ in range(100)],
            "calls": call,
        },
        laps,
    )
    work = {
        "GB_per_s": ("sum", numbers.nbytes / 1e9),
        "GB_per_s_matrix_vector": ("matrix-vector", matrix.nbytes / 1e9),
        "GFLOP_per_s": ("matrix-matrix", 2 * 2048**3 / 1e9),
        "GFLOP_per_s_16_rows": ("sixteen rows", 100 * 2 * 16 * 576 * 1536 / 1e9),
    }
    rates = {key: [round(much / s, 2) for s in seconds[name]] for key, (name, much) in work.items()}
    yield {"figure": "machine"} | rates | {"seconds_per_call": [s / calls for s in seconds["calls"]]}


def lines_of(group: str, laps: int) -> Iterator[dict]:
    """The lines of one of `GROUPS`."""
    if group == "machine":
        yield from machine(laps)
    elif group == "prices":
        from recipes.serving_prices import prices

        yield from prices(laps)
    else:
        yield from steps(*group.split(), laps=laps)


def processor_seconds() -> tuple[float, float]:
    """Seconds that all processes, and this one, have computed for."""
    machine, own = psutil.cpu_times(), time.process_time()
    return machine.user + machine.system + getattr(machine, "nice", 0.0), own


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument("--out", type=Path, default=data_folder() / RESULTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    about = hardware() | {"cpus": os.cpu_count()}
    about |= {package: version_of(package) for package in ("torch", "transformers", "peft")}
    with jsonl.resuming(given.out), torch.no_grad():
        done = {line["group"] for line in jsonl.read(given.out)}
        for group in given.groups:
            if group in done:
                continue
            # a group is whole or not there: laps of two runs are not of one machine
            busy, own, started = *processor_seconds(), time.perf_counter()
            lines = list(lines_of(group, given.laps))
            others = np.subtract(processor_seconds(), (busy, own)) @ (1, -1) / (time.perf_counter() - started)
            for line in lines:
                append(given.out, {"group": group} | line | {"others": round(others, 3), "machine": about})
                print(line, flush=True)


if __name__ == "__main__":
    main()
