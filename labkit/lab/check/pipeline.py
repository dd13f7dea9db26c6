"""Checks of the exercises on TRL's pipeline: its labels, its warm-up, and two means that are both called held-out loss."""

import random
from collections.abc import Callable

from labkit.data.batches import IGNORE
from labkit.lab.check.compare import compare


def completion_labels(function: Callable) -> None:
    """`function(prompt, whole, max_length)`: the labels that TRL makes of a prompt and of prompt and completion together.

    Lists of ids. The completion begins where the two first differ, which may be before the end of the prompt. The row is
    cut to its first `max_length` tokens.
    """
    cases: list[tuple[bool, int]] = []

    def inputs():
        if not cases:  # a token across the border, and a row that is cut, each surely once
            cases.extend(random.sample([(True, 0), (False, 2), (True, 2), (False, 0), (True, 1)], 5))
        merged, cut = cases.pop()
        prompt, answer = random.sample(range(10, 60), random.randint(4, 7)), random.sample(range(60, 99), 6)
        whole = [*prompt[:-1], 99, *answer] if merged else prompt + answer
        return prompt, whole, len(whole) - cut if cut else len(whole) + 4

    def border(prompt, whole):
        return next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))

    def labels(prompt, whole, max_length, start=None):
        start = border(prompt, whole) if start is None else start
        return [IGNORE if i < start else token for i, token in enumerate(whole)][:max_length]

    compare(
        "completion_labels",
        function,
        labels,
        {
            "a token may reach across the border: the completion begins where the two *differ*, not after len(prompt)": (
                lambda prompt, whole, n: labels(prompt, whole, n, len(prompt))
            ),
            "the row is longer than max_length allows: cut it to its first max_length tokens": (
                lambda prompt, whole, n: labels(prompt, whole, len(whole))
            ),
            "keep_start keeps the *first* tokens; yours keeps the last": (
                lambda prompt, whole, n: labels(prompt, whole, len(whole))[-n:]
            ),
            "labels stand at the place of their own token; the model shifts them, you need not": (
                lambda prompt, whole, n: [*labels(prompt, whole, n)[1:], IGNORE]
            ),
            "that supervises the prompt and ignores the completion": lambda prompt, whole, n: [
                token if label == IGNORE else IGNORE for token, label in zip(whole, labels(prompt, whole, n))
            ],
            f"a label that is not learned is {IGNORE}, not 0": (
                lambda prompt, whole, n: [
                    0 if label == IGNORE else label for label in labels(prompt, whole, n)
                ]
            ),
        },
        inputs,
    )


def their_rate(function: Callable) -> None:
    """`function(step, total, warm, lr)`: transformers' linear schedule, for the steps 0 … total - 1, `warm` of them warm-up."""
    places: list[str] = []

    def inputs():
        total, warm = random.randint(20, 40), random.randint(4, 8)
        if (
            not places
        ):  # the first step, one of the warm-up, the first after it, one on the way down, the last
            places.extend(["first", "warm", "peak", "down", "last"])
        step = {
            "first": 0,
            "warm": random.randint(1, warm - 1),
            "peak": warm,
            "down": random.randint(warm + 3, total - 3),
            "last": total - 1,
        }[places.pop()]
        return step, total, warm, random.choice([100.0, 200.0])

    def rate(step, total, warm, lr, first=0, end=0, fall=True):
        if step < warm:
            return lr * (step + first) / warm
        return lr * ((total - end - step) / (total - end - warm) if fall else 1.0)

    compare(
        "their_rate",
        function,
        rate,
        {
            "that is our warm-up, lr (step + 1) / warm; theirs begins at a rate of zero": (
                lambda step, total, warm, lr: rate(step, total, warm, lr, first=1)
            ),
            "the rate falls over the steps *after* the warm-up: divide by total - warm": lambda step, total, warm, lr: (
                rate(step, total, warm, lr) if step < warm else lr * (total - step) / total
            ),
            "the last step still has a rate above zero: it would be zero one step later": (
                lambda step, total, warm, lr: rate(step, total, warm, lr, end=1)
            ),
            "after the warm-up the rate falls to zero; yours stays": (
                lambda step, total, warm, lr: rate(step, total, warm, lr, fall=False)
            ),
            "the warm-up is missing": lambda step, total, warm, lr: lr * (total - step) / total,
        },
        inputs,
    )


def two_means(function: Callable) -> None:
    """`function(sums, counts, batch_size)`: (transformers' eval_loss, the loss per token) of records in their order.

    `sums` holds the nats of each record, `counts` its supervised tokens; the number of records is a multiple of
    `batch_size`.
    """

    def inputs():
        size = random.choice([2, 3])
        counts = [random.choice([2, 3, 20, 30]) for _ in range(size * random.randint(2, 4))]
        counts[:2] = 2, 30
        return [n * random.uniform(0.5, 4.0) for n in counts], counts, size

    def batches(sums, counts, size):
        starts = range(0, len(sums), size)
        return [sum(sums[i : i + size]) / sum(counts[i : i + size]) for i in starts]

    def mean(values):
        return sum(values) / len(values)

    def means(sums, counts, size):
        return mean(batches(sums, counts, size)), sum(sums) / sum(counts)

    compare(
        "two_means",
        function,
        means,
        {
            "the order: first theirs, over batches, then the one over tokens": (
                lambda sums, counts, size: means(sums, counts, size)[::-1]
            ),
            "each batch has one loss, over all its tokens; yours takes the mean of its records' means": (
                lambda sums, counts, size: (
                    mean([s / n for s, n in zip(sums, counts)]),
                    sum(sums) / sum(counts),
                )
            ),
            "a mean over tokens divides all nats by all tokens; yours is a mean over records": (
                lambda sums, counts, size: (
                    means(sums, counts, size)[0],
                    mean([s / n for s, n in zip(sums, counts)]),
                )
            ),
            "the two differ: a batch counts once in theirs, however many tokens it has": (
                lambda sums, counts, size: (sum(sums) / sum(counts),) * 2
            ),
            "that is nats per record: divide by tokens": lambda sums, counts, size: (mean(sums), mean(sums)),
        },
        inputs,
        parts=("eval_loss", "the loss per token"),
    )
