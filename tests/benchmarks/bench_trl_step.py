"""One QLoRA step of SmolLM2-135M on the same four tickets: here, by TRL told to do the same, and by TRL as it comes.

"TRL, told" has our settings (`labkit.formats.trl_settings`) and its adapter put back in fp32. "TRL, as it comes" keeps what
TRL 1.16 sets itself: autocast to bf16, activations recomputed, the adapter in bf16. All three have an NF4 base with double
quantization, products in what this processor multiplies fast, and the same ids and labels. TRL's step is `training_step` of
its trainer, clipping, and its optimizer; ours is the same of `labkit.training`.

The steps alternate in one run, the first round is not counted, and medians and their ratios are printed. Each also takes three
steps in a process of its own, for the peak of its resident memory above that after the imports, of which TRL has more; the
imports are printed apart. With `--record` all laps are kept: data/results/trl_step.json.

    python tests/benchmarks/bench_trl_step.py [--rounds 5] [--record data/results/trl_step.json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
from bench_train_step import peak_resident
from torch import nn

import labkit
from labkit.checks import version_of
from labkit.data.batches import Batch, make_batch_of
from labkit.data.encoding import encode
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.files.writing import write_text
from labkit.hardware import product_dtype
from labkit.models.loading import local_folder
from labkit.sweeps.processes import hardware
from labkit.training.limits import padding_id
from labkit.training.loss import supervised_loss

MODEL, BATCH, LORA = "smollm2-135m", 4, labkit.LoRAConfig(r=16, alpha=32)
CONFIG = labkit.TrainConfig(lr=2e-3, steps=10, batch_size=BATCH, warmup=0.0, progress=False)
PACKAGES = ("labkit", "torch", "transformers", "trl", "peft", "bitsandbytes")


def make_batch(model: nn.Module, tokenizer) -> Batch:
    examples = [encode(ticket_chat(ticket), tokenizer) for ticket in load_tickets("train")[:BATCH]]
    return make_batch_of(examples, padding_id(tokenizer, model))


def ours():
    """A function that takes one step of ours, and returns its loss."""
    model, tokenizer = labkit.models.load(MODEL)
    labkit.quantize_model(model, compute_dtype=product_dtype("cpu"), progress=False)
    labkit.add_lora(model, LORA).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, batch = torch.optim.AdamW(trained, lr=CONFIG.lr, fused=True), make_batch(model, tokenizer)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = supervised_loss(model, batch) / batch.n_supervised
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def theirs(told: bool):
    """A function that takes one step of TRL's trainer, and returns its loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from labkit.formats.trl_settings import bitsandbytes_settings, peft_settings, sft_settings

    folder = local_folder(MODEL)
    four_bit = BitsAndBytesConfig(
        **bitsandbytes_settings(labkit.QuantConfig(compute_dtype=product_dtype("cpu")))
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bit, dtype=torch.float32, device_map="cpu"
    )
    settings = sft_settings(CONFIG)
    if not told:
        settings |= {"bf16": True, "activation_checkpointing": True}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = make_batch(base, tokenizer)
    trainer = SFTTrainer(
        base,
        args=SFTConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, **settings),
        train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(**peft_settings(LORA)),
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    if told:
        for parameter in trained:
            parameter.data = parameter.data.float()
    trainer.create_optimizer()
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    inputs = {"input_ids": batch.ids, "labels": batch.targets, "attention_mask": torch.ones_like(batch.ids)}
    supervised = torch.tensor(batch.n_supervised)

    def step() -> float:
        trainer.optimizer.zero_grad()
        loss = trainer.training_step(trainer.model, dict(inputs), supervised)
        trainer.accelerator.clip_grad_norm_(trained, 1.0)
        trainer.optimizer.step()
        return loss.item()

    return step


MAKERS = {
    "labkit": ours,
    "TRL, told": lambda: theirs(told=True),
    "TRL, as it comes": lambda: theirs(told=False),
}


def imported(name: str) -> None:
    """Import what a side needs, so that memory can be counted from there."""
    import transformers
    from transformers import LlamaForCausalLM  # noqa: F401

    if name != "labkit":
        import bitsandbytes  # noqa: F401
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401
        from trl import SFTTrainer  # noqa: F401
    transformers.logging.set_verbosity_error()


def measure_peak(name: str) -> None:
    """Print the resident bytes after the imports, and the peak of three steps."""
    import psutil

    imported(name)
    before = psutil.Process().memory_info().rss
    step = MAKERS[name]()
    for _ in range(3):
        step()
    print(json.dumps({"imports": before, "peak": peak_resident()}))


def take_turns(rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turns; the first round warms up and is not counted."""
    steps = {name: make() for name, make in MAKERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            loss = step()
            if i:
                seconds[name].append(round(time.perf_counter() - started, 4))
            print(f"{name:18} step {i}: loss {loss:.4f}", file=sys.stderr)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--peak", help="internal: print the peak memory of one side")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.peak:
        measure_peak(given.peak)
        return
    run = lambda name: subprocess.run(  # noqa: E731
        [sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True
    )
    memory = {name: json.loads(run(name).stdout.splitlines()[-1]) for name in MAKERS}
    imported("TRL")
    seconds = take_turns(given.rounds)
    first = statistics.median(seconds["labkit"])
    rows = []
    for name, laps in seconds.items():
        above = memory[name]["peak"] - memory[name]["imports"]
        print(
            f"{name:18} median {statistics.median(laps):5.2f} s ({statistics.median(laps) / first:.2f}×), peak "
            f"{above / 1e6:5.0f} MB above {memory[name]['imports'] / 1e6:4.0f} MB of imports"
        )
        rows.append(
            {"side": name, "seconds": laps, "peak_above_imports": above, "imports": memory[name]["imports"]}
        )
    if given.record:
        record = {
            "command": "python tests/benchmarks/bench_trl_step.py --record data/results/trl_step.json",
            "model": MODEL,
            "batch": BATCH,
            "hardware": hardware(),
            "versions": {package: version_of(package) for package in PACKAGES},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
        }
        write_text(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
