"""Merging the 210 adapters of SmolLM2-135M into its weights: here and by PEFT's `merge_and_unload`.

Each round loads a model for every method and merges its adapter of rank 16, with random factors, in turns, so that a busy
machine slows all of them; loading is not counted. Medians and their ratios to PEFT are printed, and the largest difference of a
merged weight from PEFT's. Each method also merges once in a process of its own, for the peak of its anonymous memory above that
before the merge. The loaded weights are pages of their file, which the system can drop and read again: they do not count, until
a method writes to them and so gets a copy. `merge` keeps the old weights for `unmerge`; `unload` and PEFT keep none.

    python tests/benchmarks/bench_merge.py [--only time|memory] [--rounds 5] [--dtype float32|bfloat16] [--model smollm2-135m]
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable

import torch
from bench_train_step import peaks, verdict
from torch import nn

from labkit import models
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.merging import merge, unload
from labkit.memory.resident import status

RANK, ALPHA = 16, 32
PEER = "PEFT, merge_and_unload"
BOUNDS = {"labkit, unload": 0.7}  # what the course promises, relative to PEFT


def randomize(model: nn.Module) -> nn.Module:
    """Give each factor the random numbers that its shape and its place in the model say."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def ours(name: str, dtype: str) -> nn.Module:
    return randomize(add_lora(models.load(name, dtype)[0], LoRAConfig(r=RANK, alpha=ALPHA)))


def peers(name: str, dtype: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return randomize(get_peft_model(models.load(name, dtype)[0], config))


METHODS = {
    PEER: (peers, lambda model: model.merge_and_unload()),
    "labkit, unload": (ours, unload),
    "labkit, merge": (ours, merge),
}


def peak_of_anonymous(act: Callable[[], object], interval: float = 0.0005) -> int:
    """Bytes: the most anonymous memory of this process during `act`, looked up at an interval in seconds.

    The system keeps a high-water mark of all resident memory only, mapped files included.
    """
    seen, over = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(interval):
            seen.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        held = act()  # what it returns stays alive until memory is looked up once more
    finally:
        over.set()
        watcher.join()
    seen.append(status("RssAnon"))
    del held
    return max(seen)


def peak_memory(method: str, name: str, dtype: str) -> None:
    """Print the peak of anonymous memory in one merge above that before it, in MB; run in a fresh process."""
    make, act = METHODS[method]
    model = make(name, dtype)
    before = status("RssAnon")
    print((peak_of_anonymous(lambda: act(model)) - before) / 1e6)


def times(name: str, dtype: str, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each merge, taken in turns, and the largest difference between weights of `unload` and of PEFT."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    apart = 0.0
    for i in range(rounds + 1):  # the first round warms up and is not counted
        merged = {}
        for method, (make, act) in METHODS.items():
            model = make(name, dtype)
            started = time.perf_counter()
            done = act(model)
            took = time.perf_counter() - started
            if i:
                seconds[method].append(took)
            elif method != "labkit, merge":  # whose layers have other names
                merged[method] = done.state_dict()
        if merged:
            one, other = merged.values()
            apart = max((one[key].float() - other[key].float()).abs().max().item() for key in one)
    return seconds, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", default="smollm2-135m", help="or tiny-llama, for a quick look")
    parser.add_argument("--peak", help="internal: print the peak memory of one method")
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(arguments.peak, arguments.model, arguments.dtype)
        return
    print(f"{arguments.model} in {arguments.dtype}, r={RANK}, {torch.get_num_threads()} threads")
    if arguments.only != "time":
        settings = ["--model", arguments.model, "--dtype", arguments.dtype]
        peak = peaks([sys.executable, __file__, *settings, "--peak"], METHODS)
        for method, megabytes in peak.items():
            ratio = megabytes / peak[PEER]
            print(f"{method:24} peak {megabytes:6.0f} MB of anonymous memory ({ratio:.2f}×)", flush=True)
    if arguments.only != "memory":
        seconds, apart = times(arguments.model, arguments.dtype, arguments.rounds)
        for method, taken in seconds.items():
            median = statistics.median(taken)
            ratio = median / statistics.median(seconds[PEER])
            print(
                f"{method:24} median {1000 * median:6.0f} ms ({ratio:.2f}×), fastest {1000 * min(taken):6.0f} ms"
                f"{verdict(BOUNDS.get(method), ratio)}"
            )
        print(f"largest difference of a merged weight from PEFT's: {apart:.1e}")


if __name__ == "__main__":
    main()
