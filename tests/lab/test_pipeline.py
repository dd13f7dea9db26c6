"""The furniture of `16_production_pipeline`: checks that name mistakes, and the explorer of what is learned."""

import numpy as np

from labkit.lab.check import pipeline as check
from labkit.lab.explore import pipeline as explore
from tests.lab import exercise_checks, explorers


def their_labels(prompt, whole, most, start=None):
    """By a mask of arrays, where the check goes by lists."""
    same = [a == b for a, b in zip(prompt, whole)]
    if start is None:
        start = same.index(False) if False in same else len(prompt)
    kept = np.arange(len(whole)) >= start
    return np.where(kept, whole, -100)[:most].tolist()


def schedule(step, total, warm, lr, shift=0):
    """By interpolation between its three corners."""
    return float(np.interp(step + (shift if step < warm else 0), [0, warm, total], [0, lr, 0]))


def both_means(sums, counts, size):
    batches = np.reshape(sums, (-1, size)).sum(1) / np.reshape(counts, (-1, size)).sum(1)
    return float(batches.mean()), float(np.sum(sums) / np.sum(counts))


def by_record(sums, counts):
    return float(np.mean(np.divide(sums, counts)))


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.completion_labels,
        their_labels,
        [
            (lambda p, w, n: their_labels(p, w, n, len(p)), "not after len"),
            (lambda p, w, n: their_labels(p, w, 10**6), "cut it"),
            (lambda p, w, n: their_labels(p, w, 10**6)[-n:], "yours keeps the last"),
            (lambda p, w, n: [*their_labels(p, w, n)[1:], -100], "shifts them"),
            (
                lambda p, w, n: [t if x == -100 else -100 for t, x in zip(w, their_labels(p, w, n))],
                "supervises the prompt",
            ),
            (lambda p, w, n: [max(0, x) for x in their_labels(p, w, n)], "not 0"),
        ],
    )
    yield (
        check.their_rate,
        schedule,
        [
            (lambda *row: schedule(*row, shift=1), "begins at a rate of zero"),
            (
                lambda s, total, warm, lr: lr * s / warm if s < warm else lr * (1 - s / total),
                "divide by total - warm",
            ),
            (
                lambda s, total, warm, lr: float(np.interp(s, [0, warm, total - 1], [0, lr, 0])),
                "one step later",
            ),
            (lambda s, total, warm, lr: lr * min(1, s / warm), "yours stays"),
            (lambda s, total, warm, lr: lr * (1 - s / total), "warm-up is missing"),
        ],
    )
    yield (
        check.two_means,
        both_means,
        [
            (lambda *row: both_means(*row)[::-1], "the order"),
            (lambda s, n, size: (by_record(s, n), both_means(s, n, size)[1]), "its records' means"),
            (lambda s, n, size: (both_means(s, n, size)[0], by_record(s, n)), "a mean over records"),
            (lambda s, n, size: (both_means(s, n, size)[1],) * 2, "counts once"),
            (lambda s, n, size: (float(np.mean(s)),) * 2, "divide by tokens"),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The explorer

WORDS = ["Ticket", "\n", "about", " a", " very" * 9, " lamp", "$", "<end>"]


def prepared(record, columns, max_length):
    """Rows of three records; what is learned begins at the sixth token, or at the first."""
    ids = list(range(len(WORDS))) * (record + 1)
    start = 5 if columns == "two" else 0
    return ids[:max_length], [-100 if place < start else token for place, token in enumerate(ids)][
        :max_length
    ]


def show(**values):
    first = {"record": 0, "columns": "two", "max_length": 60} | values
    return lambda: explore.labels_explorer(prepared, WORDS.__getitem__, 20, ["two", "one"], 60, [first])


def test_the_explorer_counts_what_is_learned_and_draws_headless():
    (figure,) = explorers.shown(explore, show())
    assert explorers.title(figure) == "two, max_length 60: 3 of 8 tokens are learned"
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts][1] == "⏎"
    assert sum(text.get_weight() == "bold" for text in axes.texts) == 3


def test_the_explorer_draws_for_every_value_of_its_controls():
    explorer = explorers.Explorer(explore, show(), interactive=True)
    assert set(explorer.controls) == {"record", "columns", "max_length"}
    figure = explorer.figure(record=12, columns="one", max_length=60)
    assert "60 of 60 tokens" in explorers.title(figure)
    assert "0 of 4 tokens" in explorers.title(explorer.figure(max_length=4))
    assert "0 of 0 tokens" in explorers.title(explorer.figure(max_length=0))


def test_no_line_of_the_picture_is_wider_than_it():
    texts = ["word"] * 100 + ["x" * 200, "y"]
    lines = explore.lines_of(texts)
    assert [place for line in lines for place in line] == list(range(len(texts)))
    assert all(sum(len(texts[p]) for p in line) <= explore.WIDTH or len(line) == 1 for line in lines)
