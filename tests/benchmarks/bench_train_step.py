"""One training step of SmolLM2-135M: QLoRA here, LoRA here, and QLoRA by PEFT over bitsandbytes, on the same batch.

The three alternate in one run, so that a busy machine slows all of them; medians and their ratios are printed. Then each
takes the same steps in a process of its own, for the peak of its resident memory above what it had after the imports.

    python tests/benchmarks/bench_train_step.py
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch

from labkit import models
from labkit.data import Batch
from labkit.lora import LoRAConfig, add_lora
from labkit.quant_linear import quantize_model
from labkit.train import supervised_loss

BATCH, TOKENS, SUPERVISED, RANK = 8, 80, 40, 16


def make_batch() -> Batch:
    """8 × 80 random tokens, of which the last 40 are supervised."""
    ids = torch.randint(100, 49_000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[:, :-SUPERVISED] = -100
    return Batch(ids, targets)


def ours(quantized: bool):
    model, _ = models.load("smollm2-135m")
    if quantized:
        quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(r=RANK, alpha=32)).train()
    return model, lambda batch: supervised_loss(model, batch) / batch.n_supervised


def peers():
    """PEFT over bitsandbytes' Linear4bit, with the loss as transformers computes it."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model, _ = models.load("smollm2-135m")
    options = {
        "bias": False,
        "compute_dtype": torch.float32,
        "quant_type": "nf4",
        "compress_statistics": True,
    }
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    four_bit = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
                    four_bit.load_state_dict({"weight": linear.weight.data})
                    setattr(block, name, four_bit.to("cpu"))
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    return model, lambda batch: model(input_ids=batch.ids, labels=batch.targets, use_cache=False).loss


MAKERS = {
    "QLoRA, labkit": lambda: ours(True),
    "LoRA, labkit": lambda: ours(False),
    "QLoRA, PEFT + bnb": peers,
}


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


def peak_memory(name: str, steps: int) -> None:
    """Print the peak resident memory of `steps` steps above that after the imports, in MB; run in a fresh process."""
    import resource

    import bitsandbytes  # noqa: F401  # so that every method starts from the same imports
    import peft  # noqa: F401
    import psutil
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    before = psutil.Process().memory_info().rss
    step, batch = make_step(MAKERS[name]), make_batch()
    for _ in range(steps):
        step(batch)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", help="internal: print the peak memory of one method")
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(arguments.peak, steps=3)
        return
    steps, batch = {name: make_step(maker) for name, maker in MAKERS.items()}, make_batch()
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(arguments.rounds + 1):  # the first round warms up and is not counted
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name].append(step(batch))
            if i:
                times[name].append(time.perf_counter() - started)
    command = [sys.executable, __file__, "--peak"]
    peaks = {
        name: float(
            subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout.split()[-1]
        )
        for name in steps
    }
    reference = "QLoRA, PEFT + bnb"
    print(
        f"{BATCH} × {TOKENS} tokens, r={RANK} on all linears, {torch.get_num_threads()} threads, median of {arguments.rounds}"
    )
    for name in steps:
        median = statistics.median(times[name])
        ratio, memory = median / statistics.median(times[reference]), peaks[name] / peaks[reference]
        print(
            f"{name:18} {median:6.2f} s ({ratio:.2f}×)   peak {peaks[name]:6.0f} MB ({memory:.2f}×)   loss {losses[name][-1]:.4f}"
        )
    lora, qlora = (statistics.median(times[name]) for name in ("LoRA, labkit", "QLoRA, labkit"))
    print(f"QLoRA against LoRA, both labkit: {qlora / lora:.2f}×")


if __name__ == "__main__":
    main()
