"""A real fine-tune: QLoRA learns to read tickets, as in lesson 08, with the settings of the GPU profile.

SmolLM2-135M, where its folder is in labkit's cache, is the flagship. tiny-llama comes with the repository: 4 million
weights that were trained on plain text, so expect the form of the answers from it, and little of their content. Test
tickets have names, products and phrasings that training never shows, and an answer counts if all six fields are right.

That a loss falls does not show that it is the right loss. So the first steps are taken twice, from the same start and on
the same batches: on the GPU and on the CPU, whose kernels are held to the reference bit for bit. In fp32 the
two differ by the order of their sums.
"""

import copy
import statistics
import time
from dataclasses import replace

import torch
from torch import nn

from gpu.measurement import Measurement, Numbers, Section, Skipped, Stage
from labkit import models
from labkit.data.tickets import TICKET_INSTRUCTION, TICKET_TOKENS, load_tickets, ticket_answer, ticket_chat
from labkit.hardware import compute_dtype
from labkit.lora.config import LoRAConfig
from labkit.lora.qlora import add_qlora
from labkit.models.fetching import SOURCES, ModelUnavailable, is_complete
from labkit.paths import cache_folder
from labkit.training.config import TrainConfig
from labkit.training.evaluate import chat_prompts, generate, held_out_loss
from labkit.training.loop import train
from labkit.training.metrics import score_json

CONFIG = LoRAConfig(r=16, alpha=32)
EVAL_BATCH = 100  # prompts that are answered at a time
TRAINING = {  # lesson 08's rate, and batch and epochs of the GPU profile; tiny-llama needs a higher rate and more epochs
    "smollm2-135m": TrainConfig(lr=2e-3, batch_size=8, epochs=3.0, progress=False),
    "tiny-llama": TrainConfig(lr=6e-3, batch_size=8, epochs=6.0, progress=False),
}
ANSWER_TOKENS = {
    "smollm2-135m": TICKET_TOKENS,
    "tiny-llama": 84,
}  # a few more than the longest right answer has
SEEDS = {"smollm2-135m": (0,), "tiny-llama": (0, 1, 2)}
FIRST_STEPS = 8
ENOUGH = 25  # seconds after which no further seed is begun


def measurements(stage: Stage) -> list[Measurement]:
    """The check against the CPU, then the flagship, then tiny-llama."""
    return [
        Measurement("tiny-llama, first steps against the CPU", first_steps, needs_bytes=10**9, seconds=6),
        Measurement("smollm2-135m, tickets", lambda s: tickets(s, "smollm2-135m"), 4 * 10**9, seconds=35),
        Measurement("tiny-llama, tickets", lambda s: tickets(s, "tiny-llama"), 2 * 10**9, seconds=25),
    ]


def record_of(ticket: dict, model: str) -> dict:
    """A ticket to train on: a chat, or plain text for tiny-llama, which knows no chats."""
    if model != "tiny-llama":
        return ticket_chat(ticket)
    prompt = f"{TICKET_INSTRUCTION}\n{ticket['message']}\n"
    return {"prompt": prompt, "completion": ticket_answer(ticket["label"])}


def prompts_of(tickets: list[dict], model: str, tokenizer) -> list[str]:
    """What the model is asked, up to where its answer begins."""
    records = [record_of(ticket, model) for ticket in tickets]
    return [r["prompt"] for r in records] if model == "tiny-llama" else chat_prompts(records, tokenizer)


def load(name: str, dtype: torch.dtype, stage: Stage):
    """The base model and its tokenizer, without a network.

    Raises:
        Skipped: it is not in the cache.
    """
    if name in SOURCES:
        try:
            there = is_complete(cache_folder() / name, SOURCES[name])
        except (ModelUnavailable, ValueError) as error:
            raise Skipped(str(error)) from None
        if not there:
            raise Skipped(
                f"{name} is not in labkit's cache; copy its folder from a machine where `make model` has made it, or set "
                "LABKIT_CACHE to the folder that it is in"
            )
    return models.load(name, dtype=dtype, device=stage.device)


def tickets(stage: Stage, name: str) -> Numbers:
    """Fine-tune `name` on the tickets with each seed; exact match on the test tickets before and after."""
    train_tickets, validation, test = (load_tickets(split) for split in ("train", "validation", "test"))
    training, tokens = TRAINING[name], ANSWER_TOKENS[name]
    if stage.rehearsal:
        train_tickets, validation, test, tokens = train_tickets[:2], validation[:1], test[:2], 3
        training = replace(training, steps=2, batch_size=1)
    dtype = compute_dtype(stage.device)
    records = [record_of(ticket, name) for ticket in train_tickets]
    held_out = [record_of(ticket, name) for ticket in validation]
    labels, started, runs = [ticket["label"] for ticket in test], time.perf_counter(), []
    before = None
    for seed in SEEDS[name][: 1 if stage.rehearsal else None]:
        if runs and time.perf_counter() - started > ENOUGH:
            break
        model, tokenizer = load(name, dtype, stage)
        prompts = prompts_of(test, name, tokenizer)
        before = before or score_json(answers(model, tokenizer, prompts, tokens), labels)
        torch.manual_seed(seed)
        add_qlora(model, CONFIG)
        loss_before, _ = held_out_loss(model, tokenizer, held_out)
        stage.tidy()
        begun = time.perf_counter()
        history = train(model, tokenizer, records, replace(training, seed=seed))
        seconds = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated(stage.device) if stage.cuda else None
        score = score_json(answers(model, tokenizer, prompts, tokens), labels)
        loss, _ = held_out_loss(model, tokenizer, held_out)
        runs.append(
            {
                "seed": seed,
                "exact_match": score.exact_match,
                "parse_rate": score.valid_json / score.n,
                "field_match": statistics.mean(score.per_field.values()),
                "fields": score.per_field,
                "held_out_loss_before": loss_before,
                "held_out_loss": loss,
                "minutes": seconds / 60,
                "tokens_per_second": history.tokens_per_second,
                "peak_bytes": peak,
                "steps": len(history.steps),
            }
        )
        del model
    means = ("exact_match", "parse_rate", "field_match", "held_out_loss_before", "held_out_loss", "minutes")
    means += ("tokens_per_second",)
    return {
        "model": name,
        "exact_match_before": before.exact_match,
        **{name: statistics.mean(run[name] for run in runs) for name in means},
        "n_train": len(records),
        "n_test": len(labels),
        "steps": runs[0]["steps"],
        "batch_size": training.batch_size,
        "lr": training.lr,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_bytes": max((run["peak_bytes"] for run in runs), key=lambda peak: peak or 0),
        "minutes_in_all": (time.perf_counter() - started) / 60,
        "seeds": len(runs),
        "runs": runs,
    }


def answers(model: nn.Module, tokenizer, prompts: list[str], tokens: int) -> list[str]:
    """What the model writes, many prompts at a time."""
    return generate(model, tokenizer, prompts, tokens, EVAL_BATCH, progress=False)


def first_steps(stage: Stage) -> Numbers:
    """The same first steps of tiny-llama on the stage's device and on the CPU, and how far their losses are apart."""
    n = 2 if stage.rehearsal else FIRST_STEPS
    training = replace(TRAINING["tiny-llama"], steps=n, warmup=0.0, schedule="constant")
    records = [record_of(ticket, "tiny-llama") for ticket in load_tickets("train")[: n * training.batch_size]]
    base, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    torch.manual_seed(stage.seed)
    add_qlora(base, CONFIG)

    def take(
        device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> tuple[list[float], torch.Tensor]:
        """The losses on this device, and what has been trained; the adapters stay in fp32."""
        model = copy.deepcopy(base).to(device)
        if dtype != torch.float32:
            for module in model.modules():
                of_base = {
                    k: p for k, p in module._parameters.items() if p is not None and not p.requires_grad
                }
                module._parameters.update({k: nn.Parameter(p.to(dtype), False) for k, p in of_base.items()})
        losses = train(model, tokenizer, records, training).losses
        return losses, torch.cat([p.detach().cpu().flatten() for p in model.parameters() if p.requires_grad])

    on_cpu, weights = take("cpu")
    on_device, same = take(stage.device)
    dtype = torch.bfloat16 if stage.rehearsal else compute_dtype(stage.device)
    rounded = take(stage.device, dtype)[0] if dtype != torch.float32 else None
    return {
        "model": "tiny-llama",
        "steps": n,
        "losses_cpu": on_cpu,
        "losses": on_device,
        "largest_difference": largest(on_cpu, on_device),
        "weights_difference": ((same - weights).norm() / weights.norm()).item(),
        "low_precision": str(dtype).removeprefix("torch.") if rounded else None,
        "losses_low_precision": rounded,
        "largest_difference_low_precision": largest(on_cpu, rounded) if rounded else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def largest(some: list[float], others: list[float]) -> float:
    """The largest distance between two losses of the same step."""
    return max(abs(a - b) for a, b in zip(some, others))


def conclude(rows: dict[str, Numbers]) -> list[str]:
    """What was learned, and whether the GPU computes what the CPU does."""
    found = []
    for row in rows.values():
        if "losses_cpu" in row:
            found.append(
                f"{row['model']}: over {row['steps']} steps the losses in fp32 are at most {row['largest_difference']:.1e} "
                "nats from the CPU's"
                + (
                    f", and in {row['low_precision']} at most {row['largest_difference_low_precision']:.1e}"
                    if row["low_precision"]
                    else ""
                )
            )
        else:
            found.append(
                f"{row['model']}: exact match {row['exact_match_before']:.0%} before and {row['exact_match']:.0%} after "
                f"{row['steps']} steps ({row['n_test']} test tickets, {row['seeds']} "
                f"{'seed' if row['seeds'] == 1 else 'seeds'}), trained in {row['minutes']:.2g} minutes"
            )
    return found


SECTION = Section(
    "finetune",
    "QLoRA on the tickets",
    measurements,
    {
        "exact_match_before": "exact match before",
        "exact_match": "after",
        "parse_rate": "valid JSON",
        "field_match": "single fields",
        "held_out_loss": "held-out loss",
        "minutes": "minutes",
        "tokens_per_second": "tokens/s",
        "peak_bytes": "peak bytes",
        "largest_difference": "loss against the CPU",
    },
    conclude,
)
