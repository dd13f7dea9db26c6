"""Make data/results/trl_prices.jsonl: what each default of TRL and PEFT costs on tickets, switched alone.

    python -m recipes.trl_prices

SmolLM2-135M over a bitsandbytes NF4 base with double quantization, trained by TRL's own `SFTTrainer` on 80 tickets, once,
in steps of four. `REFERENCE` is what lesson 08 trains with; `SETTINGS` says what each run changes, and nothing else. The
yardstick is the same for all: labkit's held-out loss on the answers of 40 validation tickets, and the fields right on 40
test tickets. The most telling settings come first, seed by seed, so that a record that was cut short can be read. A run
that is recorded is not repeated.

One process a run, on one thread; about two minutes of CPU each. Packing holds 17 GB, all others 3. `seconds` is wall time beside whatever else the
machine did: no timing. `cpu_seconds` is the process's own.
"""

import argparse
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

from labkit.checks import version_of
from labkit.data.tickets import TICKET_FIELDS, TICKET_TOKENS, load_tickets, ticket_chat
from labkit.models.fetching import fetch
from labkit.paths import data_folder
from labkit.sweeps.records import append
from labkit.training.evaluate import chat_prompts, generate, held_out_loss
from labkit.training.metrics import parse_json
from recipes import jsonl

BASE = "smollm2-135m"
TICKETS, VALIDATION, TEST = 80, 40, 40
SEEDS = (0, 1, 2)
REFERENCE = {
    "columns": "prompt, completion",
    "adapters": "float32",
    "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "args": {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,  # below 1, transformers takes it as a share of all steps
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "per_device_train_batch_size": 4,
        "max_length": 512,
        "bf16": False,
        "gradient_checkpointing": False,
        "packing": False,
    },
}
FIRST = {
    "reference": {},
    "lr 2e-5": {"args": {"learning_rate": 2e-5}},
    "loss on the prompt too": {"columns": "messages"},
    "bf16 adapters": {"adapters": "bfloat16"},
    "q and v only": {"lora": {"target_modules": None}},
    "max_length 104": {"args": {"max_length": 104}},
    "packing": {"args": {"packing": True, "max_length": 1024}},
}
THEN = {
    "alpha = r": {"lora": {"lora_alpha": 16}},
    "8-bit AdamW": {"args": {"optim": "adamw_8bit"}},
    "dropout 0.05": {"lora": {"lora_dropout": 0.05}},
    "checkpointing": {"args": {"gradient_checkpointing": True}},
    "packing, as many tokens a step": {
        "args": {"packing": True, "max_length": 420, "per_device_train_batch_size": 1}
    },
}
SETTINGS = FIRST | THEN

Key = tuple[str, int]


def plan() -> list[Key]:
    """All runs, setting and seed, in their order."""
    return [(name, seed) for block in (FIRST, THEN) for seed in SEEDS for name in block]


def options(setting: str) -> dict:
    """`REFERENCE` with what a setting changes."""
    changed = SETTINGS[setting]
    return {
        name: {**value, **changed.get(name, {})} if isinstance(value, dict) else changed.get(name, value)
        for name, value in REFERENCE.items()
    }


def data_set(columns: str, tickets: list[dict]) -> Dataset:
    """Chats in the form that decides what TRL's loss is taken on: whole ones, or prompt and completion apart."""
    chats = [ticket_chat(ticket)["messages"] for ticket in tickets]
    if columns == "messages":
        return Dataset.from_list([{"messages": chat} for chat in chats])
    return Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])


def base_model(folder: Path) -> nn.Module:
    """The base in NF4 with double quantization; products in bf16, everything between in fp32."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, dtype=torch.float32)


def trainer_of(setting: str, seed: int, folder: Path, out: Path, tickets: list[dict]) -> SFTTrainer:
    """TRL's trainer, ready to train."""
    chosen = options(setting)
    set_seed(seed)  # A is drawn before the trainer sets its seed
    trainer = SFTTrainer(
        base_model(folder),
        args=SFTConfig(
            output_dir=str(out),
            seed=seed,
            num_train_epochs=1,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **chosen["args"],
        ),
        train_dataset=data_set(chosen["columns"], tickets),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **chosen["lora"]),
    )
    for parameter in trainable(trainer.model):  # TRL has made them bf16
        parameter.data = parameter.data.to(getattr(torch, chosen["adapters"]))
    return trainer


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fields_right(answer: str, label: dict) -> list[bool]:
    """Of each field of a ticket, has the answer it as it should be? None has it if the answer is no JSON."""
    given = parse_json(answer) or {}
    return [field in given and given[field] == label[field] for field in TICKET_FIELDS]


def reset_peak() -> None:
    """Let the kernel count this process's peak of memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(setting: str, seed: int) -> dict:
    """The line of one run."""
    torch.set_num_threads(1)
    folder, test = fetch(BASE), load_tickets("test")[:TEST]
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(setting, seed, folder, Path(out), load_tickets("train")[:TICKETS])
        reset_peak()
        wall, cpu = time.monotonic(), time.process_time()
        trainer.train()
        wall, cpu, peak = time.monotonic() - wall, time.process_time() - cpu, peak_bytes()
    model, tokenizer = trainer.model, trainer.processing_class
    validation = [ticket_chat(ticket) for ticket in load_tickets("validation")[:VALIDATION]]
    loss, tokens = held_out_loss(model, tokenizer, validation, batch_size=16)
    prompts = chat_prompts([ticket_chat(ticket) for ticket in test], tokenizer)
    answers = generate(model, tokenizer, prompts, TICKET_TOKENS, batch_size=TEST, progress=False)
    right = [fields_right(answer, ticket["label"]) for answer, ticket in zip(answers, test)]
    logged = [step for step in trainer.state.log_history if "loss" in step]
    return {
        "setting": setting,
        "seed": seed,
        "options": options(setting),
        "steps": trainer.state.global_step,
        "parameters": sum(parameter.numel() for parameter in trainable(model)),
        "held_out_loss": loss if math.isfinite(loss) else None,
        "held_out_tokens": tokens,
        "exact_match": sum(map(all, right)) / len(right),
        "fields_right": [sum(one) for one in right],
        "json": sum(parse_json(answer) is not None for answer in answers),
        "losses": [float(step["loss"]) for step in logged],
        "grad_norms": [float(step["grad_norm"]) for step in logged],
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_bytes": peak,
        "versions": {
            package: version_of(package)
            for package in ("labkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "trl_prices.jsonl")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="SETTING", help="all if left out")
    given = parser.parse_args()
    with jsonl.resuming(given.out):
        done = {(line["setting"], line["seed"]) for line in jsonl.read(given.out)}
        for key in plan():
            if key in done or (given.only and key[0] not in given.only):
                continue
            line = alone(measure, *key)
            append(given.out, line)
            shown = ("held_out_loss", "exact_match", "json", "seconds", "cpu_seconds")
            print(*key, json.dumps({name: line[name] for name in shown}), flush=True)


def alone(run: Callable[..., dict], *given: Any) -> dict:
    """What `run` returns in a process of its own, so that no run's memory is counted as another's; forked, so that the
    imports are paid for once. A process that dies, as for want of memory, is an error and not a wait without end.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(run, *given).result()


if __name__ == "__main__":
    main()
