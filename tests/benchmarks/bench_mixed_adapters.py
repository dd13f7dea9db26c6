"""One batch whose rows use n different adapters: ours against PEFT's `adapter_names`, beside the base alone.

16 rows, one new token each after a prompt that is in the cache (writing), and 16 rows of 32 tokens (reading). Adapters of rank 16 on all
linear layers, for n = 1, 4 and 16, dealt to the rows in turn; the same folders for both. All take turns in one run, so that a busy
machine slows all of them. Medians, and the median of the ratios *of the same round*, are printed. "base, again" is the base a second
time: what it differs by is noise. Before anything is timed, the log-probabilities of both are compared.

    python tests/benchmarks/bench_mixed_adapters.py [--model tiny-llama smollm2-135m] [--rounds 20] [--threads 2]
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

import labkit
from labkit import models
from labkit.lora.inject import lora_layers
from labkit.serving.batched import AdapterBank

ROWS, READ, PAST = 16, 32, 32  # rows; tokens that are read at once; tokens before the one that is written
DISTINCT = (1, 4, 16)


def load(name: str) -> nn.Module:
    return models.load(name, dtype=torch.float32)[0].eval().requires_grad_(False)


def make_folder(model: nn.Module, folder: Path, seed: int) -> Path:
    """The folder of an adapter with random numbers for `model`, which is left as it was."""
    labkit.add_lora(model, labkit.LoRAConfig(r=16))
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.02, generator=generator)
    labkit.save_adapter(model, folder)
    labkit.remove_adapter(model, "default")
    return folder


def contenders(name: str, root: Path) -> tuple[nn.Module, AdapterBank, PeftModel, list[str]]:
    """The base, ours and PEFT's with the same sixteen adapters."""
    base, names = load(name), [f"a{i}" for i in range(max(DISTINCT))]
    maker, bank, theirs = load(name), AdapterBank(load(name)), None
    for i, adapter in enumerate(names):
        folder = make_folder(maker, root / adapter, i)
        bank.load(folder, adapter)
        if theirs is None:
            theirs = PeftModel.from_pretrained(load(name), folder, adapter_name=adapter).eval()
        else:
            theirs.load_adapter(folder, adapter)
    return base, bank, theirs, names


def measured(turns: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns; the first two rounds warm up and are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds + 2):
        for name, run in turns.items():
            started = time.perf_counter()
            run()
            if i > 1:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other]))

    times = ", ".join(f"{name} {1000 * statistics.median(taken):.1f} ms" for name, taken in seconds.items())
    print(
        f"  {title}: {times}\n    PEFT / ours {ratio('PEFT', 'ours'):.2f}, ours / base {ratio('ours', 'base'):.2f}, "
        f"base again / base {ratio('base, again', 'base'):.2f}",
        flush=True,
    )


@torch.no_grad()
def compare(name: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, bank, theirs, names = contenders(name, Path(folder))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (ROWS, READ), generator=generator)
    past = torch.randint(0, base.config.vocab_size, (ROWS, PAST), generator=generator)
    print(f"{name}, fp32, {torch.get_num_threads()} threads, {ROWS} rows, rank 16, {rounds} rounds")

    def ours(rows, **inputs):
        with bank.rows(rows):
            return bank.model(**inputs)

    def pefts(rows, **inputs):
        return theirs(adapter_names=rows, **inputs)

    def plain(rows, **inputs):
        return base(**inputs)

    run = {"base": plain, "base, again": plain, "ours": ours, "PEFT": pefts}
    for distinct in DISTINCT:
        rows = [names[i % distinct] for i in range(ROWS)]
        logits, of_peft, bases = (call(rows, input_ids=ids).logits for call in (ours, pefts, plain))
        apart, away = (logits - of_peft).abs().max(), (logits - bases).abs().max()
        print(f" {distinct} adapters; logits at most {apart:.1e} apart, and {away:.1e} from the base's")
        caches = {
            key: call(rows, input_ids=past, use_cache=True).past_key_values for key, call in run.items()
        }

        def write(key, call, rows=rows, caches=caches):
            call(rows, input_ids=ids[:, :1], past_key_values=caches[key], use_cache=True)
            caches[key].crop(-1)

        writing = {key: lambda key=key, call=call, write=write: write(key, call) for key, call in run.items()}
        report("writing", measured(writing, rounds))
        reading = {
            key: lambda call=call, rows=rows: call(rows, input_ids=ids, use_cache=False, logits_to_keep=1)
            for key, call in run.items()
        }
        report("reading", measured(reading, max(3, rounds // 4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny-llama", "smollm2-135m"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in arguments.model:
        compare(name, arguments.rounds)


if __name__ == "__main__":
    main()
