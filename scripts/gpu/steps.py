"""The time of a training step: full fine-tuning, LoRA and QLoRA, by the tokens that a step takes.

Dequantizing costs the same whatever the batch, and the products grow with it, so the price of four bits falls with the
tokens of a step. LoRA leaves out the gradient of every weight, a third of full fine-tuning's products (4 P T operations
in place of 6 P T, of P weights and T tokens), and adds two small products to every layer.

All ways of one row take turns on models of the same shape with random weights, on the same batch. The learning rate
is 0, so that no step changes what the next computes; AdamW does all its work nonetheless. Adapters are in fp32, and so are
PEFT's; nothing is under autocast. Operations are counted by PyTorch in a step that is not timed.

What dequantizing costs is measured twice: as the difference between the steps of QLoRA and LoRA, and alone, all
weights as often as a step dequantizes them.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpu.machine import free_bytes, has
from gpu.measurement import Measurement, Numbers, Section, Skipped, Stage, laps, spread
from gpu.peers import peft_lora, peft_qlora
from gpu.stand_ins import small_llama
from labkit.data.batches import Batch
from labkit.memory import Setup, make_batch, plan
from labkit.memory.random_weights import random_model
from labkit.memory.setup import dtype_name
from labkit.models.shapes import config_of
from labkit.quant import linear
from labkit.quant.scratch import dequantize_to_scratch
from labkit.training.loss import supervised_loss
from labkit.training.optimizer import make_optimizer, parameter_groups
from labkit.training.recompute import checkpoint_blocks

LENGTH = 512  # tokens of an example at most
ROWS = (  # model, tokens, checkpointing, seconds on a large GPU; the most important first
    ("smollm2-1.7b", 1024, False, 6),
    ("llama-2-7b", 4096, False, 15),
    ("smollm2-1.7b", 256, False, 5),
    ("smollm2-1.7b", 4096, False, 8),
    ("llama-2-7b", 1024, False, 10),
    ("smollm2-1.7b", 16384, False, 11),
    ("llama-2-7b", 256, False, 8),
    ("llama-2-7b", 16384, True, 17),
)
REHEARSED = (("stand-in", 32, False, 1), ("stand-in", 256, False, 1), ("stand-in", 256, True, 1))
STAND_IN = small_llama(64, 176, layers=2)
METHODS = {  # in the order in which they are given room: which plan, and how a model is made
    "lora": ("lora", random_model),
    "qlora": ("qlora", random_model),
    "full": ("full", random_model),
    "peft_qlora": ("qlora", peft_qlora),
    "peft_lora": ("lora", peft_lora),
}
STAYS = ("weights", "constants", "lora", "optimizer")  # of a ledger: what is there between steps
CHEAP = 1.10  # QLoRA's step over LoRA's, below which C61's "10–20 % slower" is wrong


def measurements(stage: Stage) -> list[Measurement]:
    """A row for each model and number of tokens."""
    return [
        Measurement(
            f"{name}, {tokens} tokens" + (", checkpointing" if checkpointing else ""),
            lambda stage, row=(name, tokens, checkpointing): time_of_steps(stage, *row),
            seconds=seconds,
        )
        for name, tokens, checkpointing, seconds in (REHEARSED if stage.rehearsal else ROWS)
    ]


def time_of_steps(stage: Stage, name: str, tokens: int, checkpointing: bool) -> Numbers:
    """Every way that fits, step by step in turns."""
    config = STAND_IN if name == "stand-in" else config_of(name)
    length = min(tokens, LENGTH)
    setups = {
        way: Setup(
            method=method,
            batch_size=tokens // length,
            max_length=length,
            checkpointing=checkpointing,
            dtype=dtype_name(stage.dtype),
            device=stage.device.type,
        )
        for way, (method, _) in METHODS.items()
    }
    fitting, left_out = what_fits(config, setups, stage)
    batch = make_batch(config.vocab_size, tokens // length, length).to(stage.device)
    steps, counted = {}, {}
    for way in fitting:
        steps[way] = make_step(METHODS[way][1](config, setups[way], stage.device), batch, way, checkpointing)
        steps[way]()  # what is only done once
        counted[way] = count_operations(steps[way])
    dequantized = dequantizations(steps["qlora"])
    size = 8192 if stage.cuda else 512
    square = torch.randn(size, size, device=stage.device, dtype=stage.dtype)
    others = {"dequantize": lambda: dequantize(dequantized), "matmul": lambda: square @ square}
    times = laps(steps | others, stage, rounds=7 if tokens <= 4096 else 3)
    rate = 2 * size**3 / spread(times["matmul"])["median_s"]
    row = {
        "model": name,
        "tokens": tokens,
        "batch_size": tokens // length,
        "max_length": length,
        "checkpointing": checkpointing,
        "dtype": dtype_name(stage.dtype),
        "matmul_tflops": rate / 1e12,
        "parameters": plan(config, **vars(setups["full"])).counts["parameters"],
        "dequantized_weights": len(dequantized),
        "left_out": left_out,
    }
    for way in METHODS:
        row |= numbers_of(way, times.get(way), counted.get(way), rate)
    return row | ratios(row, spread(times["dequantize"])["median_s"])


def what_fits(config, setups: dict[str, Setup], stage: Stage) -> tuple[list[str], dict[str, str]]:
    """The ways whose models are in memory together, and why the others are left out.

    Raises:
        Skipped: there is no room for LoRA and QLoRA.
    """
    free, stays, most, fitting, left_out = free_bytes(stage.device), 0, 0, [], {}
    for way, setup in setups.items():
        missing = [name for name in ("peft", "bitsandbytes") if way.startswith("peft") and not has(name)]
        if way == "peft_lora":
            missing = [name for name in missing if name == "peft"]
        if missing:
            left_out[way] = f"{' and '.join(missing)} not installed"
            continue
        of_peers = {"logits": "all", "recompute_act": False} if way.startswith("peft") else {}
        ledger = plan(config, **vars(setup) | of_peers)
        stay = sum(ledger[component] for component in STAYS)
        if way == "peft_qlora":  # is made of the model in 16 bits
            stay = max(stay, plan(config, **vars(setups["lora"]))["weights"])
        needed = stays + stay + max(most, ledger.peak - stay)
        if needed > 0.95 * free:
            left_out[way] = f"needs {needed / 1e9:.1f} GB beside the others, and {free / 1e9:.1f} GB are free"
            continue
        fitting.append(way)
        stays, most = stays + stay, max(most, ledger.peak - stay)
    for way in ("lora", "qlora"):
        if way in left_out:
            raise Skipped(f"LoRA and QLoRA do not fit together: {way} {left_out[way]}")
    return fitting, left_out


def make_step(model: nn.Module, batch: Batch, way: str, checkpointing: bool) -> Callable[[], Tensor]:
    """A function that takes one training step: forward, backward, clipping, AdamW."""
    model.train()
    if checkpointing:
        checkpoint_blocks(model)
    groups = parameter_groups(model, lr=0.0)
    optimizer = make_optimizer("adamw", groups, None, weight_decay=0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        if way.startswith("peft"):  # with the loss that transformers computes
            loss = model(input_ids=batch.ids, labels=batch.targets, use_cache=False).loss
        else:
            loss = supervised_loss(model, batch) / batch.n_supervised
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def count_operations(step: Callable[[], Tensor]) -> int:
    """Floating-point operations of the products in a step, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def dequantizations(step: Callable[[], Tensor]) -> list[tuple]:
    """What a step dequantizes, in its order: each weight, and to which dtype."""
    calls: list[tuple] = []

    def note(weight, dtype):
        calls.append((weight, dtype))
        return dequantize_to_scratch(weight, dtype)

    with mock.patch.object(linear, "dequantize_to_scratch", note):
        step()
    return calls


@torch.no_grad()
def dequantize(calls: list[tuple]) -> None:
    """What a step dequantizes, and nothing else of it."""
    for weight, dtype in calls:
        dequantize_to_scratch(weight, dtype)


def numbers_of(way: str, seconds: list[float] | None, operations: int | None, rate: float) -> Numbers:
    """The columns of one way; None where it was left out."""
    name = "peer" if way == "peft_qlora" else way
    if seconds is None:
        return {f"{name}_s": None}
    found = spread(seconds)
    return {
        f"{name}_s": found["median_s"],
        f"{name}_min_s": found["min_s"],
        f"{name}_max_s": found["max_s"],
        f"{name}_operations": operations,
        f"{name}_of_matmul": operations / found["median_s"] / rate,
        "laps": found["laps"],
    }


def ratios(row: Numbers, dequantize_s: float) -> Numbers:
    """What is compared, and the two measures of dequantizing."""

    def over(one: str, other: str) -> float | None:
        return row[one] / row[other] if row[one] and row[other] else None

    return {
        "lora_over_full": over("lora_s", "full_s"),
        "qlora_over_lora": over("qlora_s", "lora_s"),
        "qlora_over_peer": over("qlora_s", "peer_s"),
        "lora_over_peft": over("lora_s", "peft_lora_s"),
        "dequantize_s": dequantize_s,
        "dequantize_share": dequantize_s / row["qlora_s"],
        "difference_share": 1 - row["lora_s"] / row["qlora_s"],
    }


def conclude(rows: dict[str, Numbers]) -> list[str]:
    """From how many tokens on QLoRA is cheap, and whether full fine-tuning is the fastest."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows.values()):
        taken = [row for row in rows.values() if row["model"] == model and not row["checkpointing"]]
        taken.sort(key=lambda row: row["tokens"])
        compared = [row for row in taken if row["lora_over_full"]]
        against = [row for row in taken if row["qlora_over_peer"]]
        if taken:
            least = first_from(taken, "qlora_over_lora", lambda ratio: ratio < CHEAP)
            cheap = f"below {CHEAP:g}× from {least:,} tokens on" if least else f"nowhere below {CHEAP:g}×"
            found.append(
                f"{model}, QLoRA's step over LoRA's: {in_words(taken, 'qlora_over_lora')}; {cheap} (C61)"
            )
            shares = in_words(taken, "dequantize_share", ".0%")
            found.append(f"{model}, dequantizing alone over QLoRA's step: {shares}")
        if compared:
            fast = ", ".join(f"{row['tokens']:,}" for row in compared if row["lora_over_full"] > 1)
            where = f"full is the faster at {fast} tokens" if fast else "full is nowhere the faster"
            ratios = in_words(compared, "lora_over_full")
            found.append(f"{model}, LoRA's step over full fine-tuning's: {ratios}; {where} (C66)")
        if against:
            ratios = in_words(against, "qlora_over_peer")
            found.append(f"{model}, QLoRA's step over that of PEFT + bitsandbytes: {ratios}")
    return found


def first_from(rows: list[Numbers], name: str, holds: Callable[[float], bool]) -> int | None:
    """The least tokens from which on it holds in every row, up to the most that were measured."""
    least = None
    for row in reversed(rows):
        if not holds(row[name]):
            break
        least = row["tokens"]
    return least


def in_words(rows: list[Numbers], name: str, form: str = ".2f") -> str:
    """`1.31× at 256 tokens, 1.04× at 4,096 tokens`."""
    unit = "" if form.endswith("%") else "×"
    return ", ".join(f"{row[name]:{form}}{unit} at {row['tokens']:,} tokens" for row in rows)


SECTION = Section(
    "steps",
    "The time of a training step, by the tokens that it takes",
    measurements,
    {
        "full_s": "full s",
        "lora_s": "LoRA s",
        "qlora_s": "QLoRA s",
        "peer_s": "PEFT+bnb s",
        "lora_over_full": "LoRA/full",
        "qlora_over_lora": "QLoRA/LoRA",
        "dequantize_share": "dequantizing",
        "difference_share": "by difference",
        "lora_of_matmul": "LoRA/matmul rate",
    },
    conclude,
)
