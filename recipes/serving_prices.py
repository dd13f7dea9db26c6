"""What it takes to change the adapter that answers: the group "prices" of `recipes.serving_costs`, on SmolLM2-135M.

A line for each, with the seconds of every lap:

    swap        rows name another adapter that is in memory: `AdapterBank.rows` alone; with all layers' parts made anew,
                for rows that no recent batch had; and `labkit.use_adapter`, which mounts another one on every layer
    read, load  the bytes of the file of an adapter of about 20 MB, and all of `AdapterBank.load`; "cold" after the
                system was asked to forget the file, "warm" with the file in its cache. PEFT's `load_adapter` beside them
    merge       `labkit.merge`, and `labkit.unmerge`, which puts back what it kept; a switch is both
    wrap        what a request costs that wraps the base in PEFT anew, under a name of its own, and the bytes of adapters
                that the base has after it; `AdapterBank.rows` beside it
    memory      bytes of an adapter: counted, and by the resident memory of the process over 16 loads
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

import labkit
from labkit.serving.batched import AdapterBank, BatchedLinear, Plan
from labkit.serving.few_rows import Table
from recipes.serving_costs import in_turns, load, make_folder, peft_of, timed

MODEL, ROWS, LOADED = "smollm2-135m", 16, 16
WRAPS = 5


def forget(file: Path) -> None:
    """Ask the system to drop a file from its cache."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def switch_rows(bank: AdapterBank, batches: list[list[str]]) -> Callable[[], None]:
    """Enter a batch whose rows name other adapters than the last; the plans of both are known."""
    turn = iter(range(1 << 60))

    def switch() -> None:
        with bank.rows(batches[next(turn) % len(batches)]):
            pass

    return switch


def make_parts(bank: AdapterBank, rows: list[str]) -> None:
    """What a new plan costs over all layers; a forward pass makes these on the way."""
    plan = Plan([bank.use(row) for row in rows])
    for layer in bank.model.modules():
        if isinstance(layer, BatchedLinear):
            part = plan.part(layer.name, torch.device("cpu"))
            Table(part.order, part.segments)


def swaps(bank: AdapterBank, folder: Path, laps: int) -> Iterator[dict]:
    mounted = load(MODEL)
    for name in ("a", "b"):
        labkit.load_adapter(mounted, folder, name)
    turn = iter(range(1 << 60))
    work = {
        "AdapterBank.rows": switch_rows(bank, [["a0"] * ROWS, ["a1"] * ROWS]),
        "a new plan, all layers": lambda: make_parts(bank, ["a0"] * ROWS),
        "a new plan of 16 adapters": lambda: make_parts(bank, [f"a{i}" for i in range(ROWS)]),
        "labkit.use_adapter": lambda: labkit.use_adapter(mounted, "ab"[next(turn) % 2]),
    }
    for how, seconds in in_turns(work, 5 * laps).items():
        yield {"figure": "swap", "how": how, "rows": ROWS, "seconds": seconds}


def loads(bank: AdapterBank, folder: Path, laps: int) -> Iterator[dict]:
    from peft import PeftModel

    file = folder / "adapter_model.safetensors"
    theirs = PeftModel.from_pretrained(load(MODEL), folder, adapter_name="first").eval()
    work: dict[tuple[str, str], Callable[[], object]] = {}
    for state in ("cold", "warm"):
        work["read the file", state] = file.read_bytes
        work["AdapterBank.load", state] = lambda: bank.load(folder, "new")
        work["PEFT load_adapter", state] = lambda: theirs.load_adapter(folder, "new")
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for lap in range(laps + 1):
        for key, run in work.items():
            if key[1] == "cold":
                forget(file)
            taken = timed(run)
            seconds[key] += [taken] if lap else []
            if "new" in bank.adapters:
                bank.unload("new")
            if "new" in theirs.peft_config:
                theirs.delete_adapter("new")
    for (how, state), taken in seconds.items():
        yield {"figure": "load", "how": how, "cache": state, "bytes": file.stat().st_size, "seconds": taken}


def merges(folder: Path, laps: int) -> Iterator[dict]:
    model, seconds = load(MODEL), {"merge": [], "unmerge": []}
    labkit.load_adapter(model, folder)
    for lap in range(laps + 1):
        for how, run in (("merge", labkit.merge), ("unmerge", labkit.unmerge)):
            taken = timed(lambda run=run: run(model))
            seconds[how] += [taken] if lap else []
    for how, taken in seconds.items():
        yield {"figure": "merge", "how": how, "seconds": taken}


def bytes_of_adapters(model: nn.Module) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)


def wraps(bank: AdapterBank, folder: Path) -> Iterator[dict]:
    """The names of requests differ, so each wrap leaves its adapter in the base's layers."""
    base, taken, left = load(MODEL), [], []
    for i in range(WRAPS + 1):
        taken.append(timed(lambda i=i: peft_of(base, folder, [f"request-{i}"])))
        left.append(bytes_of_adapters(base))
    seconds_of_bank = in_turns({"rows": switch_rows(bank, [["a0"], ["a1"]])}, WRAPS)["rows"]
    yield {"figure": "wrap", "how": "PEFT from_pretrained", "seconds": taken[1:], "bytes_left": left}
    yield {"figure": "wrap", "how": "AdapterBank.rows", "seconds": seconds_of_bank, "bytes_left": [0] * WRAPS}


def prices(laps: int) -> Iterator[dict]:
    """The lines of the group."""
    bank, process = AdapterBank(load(MODEL)), psutil.Process()
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(load(MODEL), Path(place) / "adapter")
        bank.load(folder, "first")
        before = process.memory_info().rss
        for i in range(LOADED):
            counted = bank.load(folder, f"a{i}").nbytes
        resident = (process.memory_info().rss - before) / LOADED
        yield {"figure": "memory", "adapters": LOADED, "counted": counted, "resident": round(resident)}
        yield from swaps(bank, folder, laps)
        yield from loads(bank, folder, laps)
        yield from merges(folder, laps)
        yield from wraps(bank, folder)
