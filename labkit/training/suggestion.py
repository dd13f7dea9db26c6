"""Settings for a first run on unknown data, each with its reason: from the number of records and their lengths, the
speed that was measured, and the minutes there are.

    passes   as many as show about `SEEN` records, repeats counted; at least one and at most `MOST_PASSES`
    batch    the largest of 8, 4, 2 with which the passes make `ENOUGH_STEPS` steps
    steps    passes x records / batch, or as many as the minutes hold, whichever is less
    minutes  (tokens in steps + half the tokens in held-out measurements) / speed, and a tenth kept back

Half, because a step has a backward pass too, about as long as the forward pass where the weights are frozen.

These settings are a place to start and no optimum. The learning rate is the one that lesson 08 trains with, on other data; the
passes are a rule of thumb. What is right for other records, only their own held-out loss says.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from labkit.checks import check_positive, check_whole
from labkit.lora.config import LoRAConfig
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.readiness import trained_parameters

SEEN = 750
MOST_PASSES = 10
BATCHES = (8, 4, 2)
ENOUGH_STEPS = 120
FEW_STEPS = 20  # in fewer, an adapter that starts at zero has hardly moved
FEW_RECORDS = 50
LR = 2e-3  # lesson 08's, for LoRA of r = 16
EVALUATIONS = 4
KEPT_BACK = 0.1  # of the minutes, since lengths and speed vary
MOST_HELD_OUT = 100


@dataclass(frozen=True)
class Suggestion:
    """Settings and why.

    Attributes:
        training, lora: what to give to `train` and `add_lora`.
        reasons: for each setting, the reason in words.
        passes: over the training records, that the steps make.
        notes: what to know before the run, or to change; [] if all is well.
    """

    training: TrainConfig
    lora: LoRAConfig
    reasons: dict[str, str]
    passes: float
    notes: list[str]


def suggest_settings(
    lengths: Sequence[int],
    minutes: float | None = None,
    tokens_per_second: float | None = None,
    held_out: Sequence[int] = (),
    context: int | None = None,
    seed: int = 0,
) -> Suggestion:
    """Settings for a run of LoRA or QLoRA over records of these lengths.

    Args:
        lengths: tokens of each training record.
        minutes: for steps and held-out measurements together; None for no limit.
        tokens_per_second: of training, as `measure_speed` measures it with the suggested batch size. None before that:
            the minutes have no say yet.
        held_out: tokens of each held-out record.
        context: positions that the model has; None for no limit.
        seed: of the run.

    Raises:
        ValueError: no lengths, one that is no whole number, a limit that is not positive, or no record that fits.
    """
    check_given(lengths, minutes, tokens_per_second, held_out, context)
    longest = max(*lengths, *held_out, 0)
    max_length = longest if context is None else min(longest, context)
    fit = [length for length in lengths if length <= max_length]
    measured = [length for length in held_out if length <= max_length]
    if not fit:
        raise ValueError(
            f"all {len(lengths)} training records are longer than the model's context of {context} tokens; shorten them"
        )
    n, wanted, notes = len(fit), min(MOST_PASSES, max(1, round(SEEN / len(fit)))), []
    reasons = {
        "steps": "",
        "batch_size": f"the largest of 2, 4 and 8 with which {passes_of(wanted)} make {ENOUGH_STEPS} steps",
        "lr": "the rate of lesson 08, for r = 16; not swept on these records",
        "max_length": f"the longest record has {longest} tokens: none is left out",
        "r": "rank 16 in every linear layer, α = 2r: where lesson 04 says to start",
    }
    if left_out := len(lengths) - n:
        reasons["max_length"] = f"the positions that the model has; the longest record has {longest} tokens"
        notes.append(f"{left_out} of {len(lengths)} training records do not fit into {context} tokens")
    batch = next((size for size in BATCHES if wanted * n >= ENOUGH_STEPS * size), BATCHES[-1])
    if wanted * n < ENOUGH_STEPS * batch:
        reasons["batch_size"] = f"the smallest of 2, 4 and 8, for there are fewer than {ENOUGH_STEPS} steps"
    per_pass = math.ceil(n / batch)
    steps = wanted * per_pass
    reasons["steps"] = f"{passes_of(wanted)} over {n:,} records, so that about {SEEN} are seen"
    if wanted == MOST_PASSES:
        reasons["steps"] = f"{passes_of(wanted)} over {n:,} records, the most that is sensible"
    elif wanted == 1:
        reasons["steps"] = f"one pass over {n:,} records: none need be seen twice"
    if minutes is not None and tokens_per_second is not None:
        budget = Budget(minutes, tokens_per_second, sum(fit), EVALUATIONS * sum(measured) / 2)
        possible = max(1, math.floor(budget.passes * per_pass))
        if possible < steps:
            steps = possible
            reasons["steps"] = f"as many as fit into {minutes:g} min at {tokens_per_second:.0f} tokens/s"
            notes.append(budget.note(steps / per_pass, wanted, sum(fit) / n))
        else:
            reasons["steps"] += (
                f"; {budget.needed(wanted):.1f} of {minutes:g} min at {tokens_per_second:.0f} tokens/s"
            )
    if steps < FEW_STEPS:
        notes.append(f"{steps} steps teach little: B starts at zero, and has hardly moved by then")
    if n < FEW_RECORDS:
        notes.append(
            f"{n} training records are soon known by heart and teach a form at most; and with {len(held_out)} held out, "
            "the interval of any result is wide"
        )
    training = TrainConfig(
        lr=LR,
        steps=steps,
        batch_size=batch,
        max_length=max_length,
        seed=seed,
        eval_every=math.ceil(steps / EVALUATIONS) if measured else None,
    )
    return Suggestion(training, LoRAConfig(r=16, alpha=32), reasons, steps / per_pass, notes)


@dataclass(frozen=True)
class Budget:
    """Minutes and speed, the tokens of one pass, and those that held-out measurements cost in the whole run."""

    minutes: float
    tokens_per_second: float
    per_pass: int
    measuring: float

    @property
    def passes(self) -> float:
        """How many the minutes hold; 0 if measuring alone takes them all."""
        tokens = (1 - KEPT_BACK) * self.minutes * 60 * self.tokens_per_second
        return max(0.0, tokens - self.measuring) / self.per_pass

    def needed(self, passes: float) -> float:
        """Minutes for so many passes."""
        return (passes * self.per_pass + self.measuring) / (60 * self.tokens_per_second * (1 - KEPT_BACK))

    def note(self, passes: float, wanted: int, mean: float) -> str:
        """What to say where the minutes hold fewer passes than wanted; `mean` tokens are in a record."""
        for_all = f"{tenths_up(self.needed(wanted))} min hold all of {passes_of(wanted)}"
        if passes >= 1:
            return f"{self.minutes:g} min hold {passes:.1f} passes; {for_all}"
        return (
            f"{self.minutes:g} min do not hold one pass: {1 - passes:.0%} of the records are never seen. "
            f"{tenths_up(self.needed(1))} min hold one; or shorten the records, {mean:.0f} tokens on average, or use a smaller model"
        )


def passes_of(n: int) -> str:
    """A number of passes in words."""
    return "one pass" if n == 1 else f"{n} passes"


def tenths_up(minutes: float) -> str:
    """Minutes, rounded up to a tenth."""
    return f"{math.ceil(10 * minutes) / 10:g}"


def check_given(lengths, minutes, tokens_per_second, held_out, context) -> None:
    """Raise a `ValueError` unless these are lengths, and limits above 0."""
    if not len(lengths):
        raise ValueError("there are no records to train on, so nothing can be suggested")
    for length in (*lengths, *held_out):
        check_whole("length", length)
    for name, value in (("minutes", minutes), ("tokens_per_second", tokens_per_second), ("context", context)):
        if value is not None:
            check_positive(name, value)


def share_to_hold_out(n: int) -> float:
    """The share of `n` records to keep for measuring: a fifth, but no more than `MOST_HELD_OUT` records.

    With 100, a share of right answers has a 95 % interval of ±10 points at most; more of them cost time and gain little.

    >>> share_to_hold_out(20), share_to_hold_out(10_000)
    (0.2, 0.01)
    """
    check_whole("n", n, at_least=2)
    return min(0.2, MOST_HELD_OUT / n)


def measure_speed(
    model: nn.Module, tokenizer, records: Sequence[dict], config: TrainConfig, steps: int = 3
) -> float:
    """Tokens per second of training, from `steps` real steps after one to warm up. The model is as before.

    Args:
        model: with what is to train.
        tokenizer, records, config: as for `train`.
        steps: to time.

    Raises:
        ValueError: as `train`.
    """
    check_whole("steps", steps)
    short = replace(
        config, steps=steps + 1, eval_every=None, patience=None, checkpoint_folder=None, progress=False
    )
    before = {parameter: parameter.detach().clone() for parameter in trained_parameters(model).values()}
    try:
        with torch.random.fork_rng():
            timed = train(model, tokenizer, records, short).steps[1:]
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
    if not timed:
        raise ValueError("the run was interrupted before a step could be timed")
    return sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed)
