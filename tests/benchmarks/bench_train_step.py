"""One training step of SmolLM2-135M: QLoRA here, LoRA here, and QLoRA by PEFT over bitsandbytes, on the same batch.

All alternate in one run, so that a busy machine slows all of them; medians and their ratios are printed. Where the
processor has matrix units for bf16, both QLoRAs also run with products in bf16, and are compared with each other. Each
also takes three steps in a process of its own, for the peak of its resident memory: the largest that the operating system
saw from the start to the end (`VmHWM` on Linux, else `ru_maxrss`), less what was resident after the imports. It counts
everything: loading the model, quantizing it, training, and memory that was freed but not given back. (bitsandbytes' layers are made
of the loaded model here; loaded by transformers' own `quantization_config`, the same training peaked 2 to 3 % higher.)

Beside the times stand the page faults of a step: memory that the allocator of C gave back to the system after one step, and asked
for again in the next. On Linux PEFT's step has over 100,000, about a second of system time, and ours almost none; that is part of
the ratio. Without it, with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ both set to 1000000000, 0.71× became 0.89× on two
cores with AVX2.

    python tests/benchmarks/bench_train_step.py [--only time|memory] [--rounds 5]
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from labkit import models
from labkit.data.batches import Batch
from labkit.hardware import product_dtype
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.surgery import is_output_layer, replace_module
from labkit.quant.model import quantize_model
from labkit.training.loss import supervised_loss

BATCH, TOKENS, SUPERVISED, RANK = 8, 80, 40, 16


def make_batch() -> Batch:
    """8 × 80 random tokens, of which the last 40 are supervised."""
    ids = torch.randint(100, 49_000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[:, :-SUPERVISED] = -100
    return Batch(ids, targets)


def ours(quantized: bool, products: torch.dtype | None = None):
    model, _ = models.load("smollm2-135m")
    if quantized:
        quantize_model(model, compute_dtype=products, progress=False)
    add_lora(model, LoRAConfig(r=RANK, alpha=32)).train()
    return model, lambda batch: supervised_loss(model, batch) / batch.n_supervised


def put_in_bitsandbytes(model: nn.Module, products: torch.dtype = torch.float32) -> nn.Module:
    """Every linear layer but the output as bitsandbytes' Linear4bit: NF4, double-quantized; in place."""
    import bitsandbytes as bnb

    options = {"compute_dtype": products, "quant_type": "nf4", "compress_statistics": True}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not is_output_layer(model, linear):
            four_bit = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, **options)
            four_bit.load_state_dict({"weight": linear.weight.data})
            replace_module(model, name, four_bit.to("cpu"))
    return model


def bitsandbytes_model(products: torch.dtype = torch.float32):
    """SmolLM2-135M in the 4 bits of bitsandbytes."""
    return put_in_bitsandbytes(models.load("smollm2-135m")[0], products)


def peers(products: torch.dtype = torch.float32):
    """PEFT over bitsandbytes' Linear4bit, with the loss as transformers computes it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(bitsandbytes_model(products), config).train()
    return model, lambda batch: model(input_ids=batch.ids, labels=batch.targets, use_cache=False).loss


MAKERS = {
    "QLoRA, labkit": lambda: ours(True),
    "LoRA, labkit": lambda: ours(False),
    "QLoRA, PEFT + bnb": peers,
}
if product_dtype("cpu") == torch.bfloat16:
    MAKERS |= {
        "QLoRA bf16, labkit": lambda: ours(True, torch.bfloat16),
        "QLoRA bf16, PEFT + bnb": lambda: peers(torch.bfloat16),
    }


def reference(name: str) -> str:
    """The peer with the same products."""
    return "QLoRA bf16, PEFT + bnb" if "bf16" in name else "QLoRA, PEFT + bnb"


def make_step(maker):
    """A function that takes one training step."""
    model, loss_of = maker()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(batch: Batch) -> float:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peak_resident() -> int:
    """Bytes: the most that this process ever had in memory."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would also count the parent before the fork
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(maker, batch_of, steps: int) -> None:
    """Print the peak resident memory of `steps` steps above that after the imports, in MB; run in a fresh process."""
    import bitsandbytes  # noqa: F401  # so that every method starts from the same imports
    import peft  # noqa: F401
    import psutil
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    before = psutil.Process().memory_info().rss
    step, batch = make_step(maker), batch_of()
    for _ in range(steps):
        step(batch)
    print((peak_resident() - before) / 1e6)


def peaks(command: list[str], names: Iterable[str]) -> dict[str, float]:
    """MB of each method, from a process of its own: `command` and its name."""
    run = lambda name: subprocess.run([*command, name], capture_output=True, text=True, check=True)  # noqa: E731
    return {name: float(run(name).stdout.split()[-1]) for name in names}


def verdict(bound: float | None, ratio: float) -> str:
    """Whether a promised ratio was kept; nothing where none was promised."""
    return "" if bound is None else f"  (promised {bound:.2f}×: {'kept' if ratio <= bound else 'NOT KEPT'})"


@dataclass
class Runs:
    """What the steps of one method took."""

    seconds: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    loss: float = math.nan  # of the last step

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def times(makers: Mapping[str, Callable], batch: Batch, rounds: int) -> dict[str, Runs]:
    """The steps of each method, taken in turns."""
    steps = {name: make_step(maker) for name, maker in makers.items()}
    runs = {name: Runs() for name in steps}
    for i in range(rounds + 1):  # the first round warms up and is not counted
        for name, step in steps.items():
            started, faults = time.perf_counter(), page_faults()
            runs[name].loss = step(batch)
            if i:
                runs[name].seconds.append(time.perf_counter() - started)
                runs[name].faults.append(page_faults() - faults)
    return runs


def page_faults() -> int:
    """How often this process got a page of memory from the system, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--peak", help="internal: print the peak memory of one method")
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(MAKERS[arguments.peak], make_batch, steps=3)
        return
    threads = torch.get_num_threads()
    print(f"{BATCH} × {TOKENS} tokens, {SUPERVISED} supervised, r={RANK} on all linears, {threads} threads")
    if arguments.only != "time":
        peak = peaks([sys.executable, __file__, "--peak"], MAKERS)
        for name in MAKERS:
            print(
                f"{name:22} peak {peak[name]:6.0f} MB ({peak[name] / peak[reference(name)]:.2f}×)", flush=True
            )
    if arguments.only != "memory":
        runs = times(MAKERS, make_batch(), arguments.rounds)
        for name, run in runs.items():
            print(
                f"{name:22} median {run.median:5.2f} s ({run.median / runs[reference(name)].median:.2f}×), "
                f"fastest {min(run.seconds):5.2f} s, {statistics.median(run.faults):7.0f} page faults   "
                f"loss after {arguments.rounds + 1} steps {run.loss:.4f}"
            )
        print(
            f"QLoRA against LoRA, both labkit: {runs['QLoRA, labkit'].median / runs['LoRA, labkit'].median:.3f}×"
        )


if __name__ == "__main__":
    main()
