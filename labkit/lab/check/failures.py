"""Checks of the exercises on sick fine-tunes: labels, steps that round to nothing, effective rates, a confusion matrix."""

import itertools
import math
import random
from collections.abc import Callable

import torch

from labkit.data.batches import IGNORE
from labkit.lab.check.compare import compare

SICK, HEALTHY, UNKNOWN = "sick", "healthy", "cannot say"
PROBES = ("labels", "training", "rate", "stopping")


def label_counts(function: Callable) -> None:
    """`function(ids, labels, answer, end)`: four counts of what is wrong with the labels of a row.

    `ids` and `labels` are lists, `answer` is where the answer begins, `end` is the place of its end mark; behind it is
    padding. The counts: labels that are not the token at their own place, supervised tokens before the answer, and 1 or 0
    each for an answer's first token and for an end mark that is not supervised.
    """

    faults = itertools.cycle(random.sample(["shifted", "prompt", "first", "end", "both"], 5))

    def inputs():
        prompt, length, padding = random.randint(4, 7), random.randint(3, 6), random.randint(1, 3)
        ids = random.sample(range(10, 99), prompt + length) + [1] * padding
        answer, end = prompt, prompt + length - 1
        labels = [t if answer <= i <= end else IGNORE for i, t in enumerate(ids)]
        fault = next(faults)
        if fault == "shifted":
            labels = [*labels[1:], IGNORE]
        if fault == "prompt":
            labels[1:answer] = ids[1:answer]
        if fault in ("first", "both"):
            labels[answer] = IGNORE
        if fault in ("end", "both"):
            labels[end] = IGNORE
        return ids, labels, answer, end

    def counts(ids, labels, answer, end, shift=0, last=None, before=0):
        kept = [i for i, label in enumerate(labels) if label != IGNORE]
        other = sum(labels[i] != (ids[i + shift] if i + shift < len(ids) else None) for i in kept)
        prompt = sum(i < answer + before for i in kept)
        return other, prompt, int(answer not in kept), int((end if last is None else last) not in kept)

    compare(
        "label_counts",
        function,
        counts,
        {
            "labels are at the place of their own token: the model's loss shifts them, you need not": (
                lambda ids, labels, answer, end: counts(ids, labels, answer, end, 1)
            ),
            "-100 is no label: leave those places out before you compare": lambda ids, labels, answer, end: (
                sum(a != b for a, b in zip(ids, labels)),
                *counts(ids, labels, answer, end)[1:],
            ),
            "the answer's first token is not part of the prompt: count places < answer": (
                lambda ids, labels, answer, end: counts(ids, labels, answer, end, 0, None, 1)
            ),
            "the end mark is at `end`; the last place of the row is padding": (
                lambda ids, labels, answer, end: counts(ids, labels, answer, end, 0, len(ids) - 1)
            ),
            "the last two are 1 where the token is *not* supervised; yours is 1 where it is": lambda *row: (
                *counts(*row)[:2],
                1 - counts(*row)[2],
                1 - counts(*row)[3],
            ),
        },
        inputs,
    )


def silent_share(function: Callable) -> None:
    """`function(p, step)`: the share of the entries of `p` that a step of either sign leaves as they are, a number.

    `p` is (n,), in bf16.
    """

    def inputs():
        powers = 2.0 ** torch.randint(-7, 3, (400,))
        p = powers * (
            1 + torch.where(torch.rand(400) < 0.5, 0.0, torch.rand(400))
        )  # half of them powers of two
        return (p * torch.randn(400).sign()).to(torch.bfloat16), random.choice(
            [1.3, 1.4]
        ) * 2.0 ** random.randint(-11, -8)

    def share(found):
        return found.double().mean().item()

    def right(p, step):
        return share((p + step == p) & (p - step == p))

    compare(
        "silent_share",
        lambda p, step: scalar(function(p, step)),
        right,
        {
            "a step can go either way: below a power of two the numbers lie twice as close as above": (
                lambda p, step: share(p + step == p)
            ),
            "it must be silent in both directions; yours counts those that are silent in one": (
                lambda p, step: share((p + step == p) | (p - step == p))
            ),
            "that is the share that moves": lambda p, step: 1 - right(p, step),
            "in 32 bits nothing is silent: let the sum round to p's own dtype": (
                lambda p, step: share((p.float() + step == p.float()) & (p.float() - step == p.float()))
            ),
            "that compares with the spacing; rounding to nearest needs *half* of it": (
                lambda p, step: share(step < spacing(p))
            ),
        },
        inputs,
    )


def spacing(p):
    """From each entry of a bf16 tensor to the next larger one."""
    return 2.0 ** (p.float().abs().log2().floor() - 7)


def scalar(answer):
    """A tensor of one number as that number; anything else as it is."""
    return answer.detach().reshape(()).item() if torch.is_tensor(answer) and answer.numel() == 1 else answer


def effective_rate(function: Callable) -> None:
    """`function(lr, alpha, r, rslora)`: the learning rate as it counts at alpha = 2 r, where a sweep was made."""
    kinds = itertools.cycle([True, False])

    def inputs():
        return (
            random.choice([1e-3, 5e-3]) * 100,
            random.choice([8, 16, 64]),
            random.choice([4, 16, 32]),
            next(kinds),
        )

    def right(lr, alpha, r, rslora):
        return lr * (alpha / (math.sqrt(r) if rslora else r)) / 2

    compare(
        "effective_rate",
        function,
        right,
        {
            "rsLoRA divides by the root of r": lambda lr, alpha, r, rslora: lr * alpha / r / 2,
            "only rsLoRA divides by the root of r; plain LoRA divides by r": (
                lambda lr, alpha, r, rslora: lr * alpha / math.sqrt(r) / 2
            ),
            "the sweep was made at a scaling of 2: divide by it": (
                lambda lr, alpha, r, rslora: 2 * right(lr, alpha, r, rslora)
            ),
            "multiply: a larger scaling makes each step count for more": (
                lambda lr, alpha, r, rslora: lr * 2 / (alpha / (math.sqrt(r) if rslora else r))
            ),
            "alpha stands for twice the rank there, not for 2: scaling / 2 is alpha / r / 2": (
                lambda lr, alpha, r, rslora: lr * alpha / 2
            ),
        },
        inputs,
    )  # fmt: skip


def matrix_rates(function: Callable) -> None:
    """`function(lines)`: (share of the sick runs whose first finding is the expected one, share of the healthy runs
    that have a finding).

    A line is {"expected": name of a probe or None, "findings": {probe: "sick", "healthy" or "cannot say"}}, in order of
    causes.
    """

    def inputs():
        lines = []
        for i in range(random.randint(14, 18)):
            findings = {probe: random.choice([SICK, HEALTHY, HEALTHY, UNKNOWN]) for probe in PROBES}
            lines.append({"expected": random.choice(PROBES) if i % 3 else None, "findings": findings})
        for i, after in ((1, HEALTHY), (4, SICK)):  # found, and not first; once as the last
            lines[i] = {"expected": "rate", "findings": dict.fromkeys(PROBES, SICK) | {"stopping": after}}
        lines[2]["findings"] = dict.fromkeys(PROBES, HEALTHY) | {"labels": UNKNOWN, "training": SICK}
        lines[2]["expected"] = "training"
        lines[0]["findings"] = dict.fromkeys(PROBES, HEALTHY) | {"labels": UNKNOWN}
        lines[3]["findings"] = dict.fromkeys(PROBES, HEALTHY)
        return (lines,)

    def found(line, outcomes=(SICK,)):
        return [probe for probe, outcome in line["findings"].items() if outcome in outcomes]

    def rates(lines, hit, alarm=found):
        sick, sound = (
            [line for line in lines if (line["expected"] is None) is which] for which in (False, True)
        )
        return sum(map(hit, sick)) / len(sick), sum(bool(alarm(line)) for line in sound) / len(sound)

    def first(line, outcomes=(SICK,)):
        return found(line, outcomes)[:1] == [line["expected"]]

    def right(lines):
        return rates(lines, first)

    compare(
        "matrix_rates",
        function,
        right,
        {
            "the expected probe must be the *first* that is sick; yours is content if it is among them": (
                lambda lines: rates(lines, lambda line: line["expected"] in found(line))
            ),
            "that is the last finding; causes come before effects": (
                lambda lines: rates(lines, lambda line: found(line)[-1:] == [line["expected"]])
            ),
            "“cannot say” is no finding": lambda lines: rates(
                lines,
                lambda line: first(line, (SICK, UNKNOWN)),
                lambda line: found(line, (SICK, UNKNOWN)),
            ),
            "two shares of two groups: sick runs and healthy ones; yours divides by all of them": lambda lines: (
                right(lines)[0] * sum(line["expected"] is not None for line in lines) / len(lines),
                right(lines)[1] * sum(line["expected"] is None for line in lines) / len(lines),
            ),
            "healthy runs without a finding are right too, but they are not sick runs that were found": (
                lambda lines: (
                    sum((found(line)[:1] or [None])[0] == line["expected"] for line in lines) / len(lines),
                    right(lines)[1],
                )
            ),
            "the second is the share of healthy runs *with* a finding": lambda lines: (
                right(lines)[0],
                1 - right(lines)[1],
            ),
            "the order: sick runs first, then healthy ones": lambda lines: right(lines)[::-1],
        },
        inputs,
    )
