"""The furniture of `09_paged_optimizers`: checks that name mistakes, and its explorer in both of its
forms.
"""

from collections import OrderedDict

import pytest
import torch

from labkit.lab.check import paging as check
from labkit.lab.explore import paging as explore
from labkit.lab.figures import paging
from labkit.optim.adamw import AdamW8bit
from labkit.optim.page import PageEvent
from labkit.quant.blockwise import dequantize_blocks
from tests.lab import exercise_checks, explorers


def lru(sequence, capacity):
    cache, count = [], 0
    for page in sequence:
        if page in cache:
            cache.remove(page)
        else:
            count += 1
            if len(cache) == capacity:
                cache.pop(0)
        cache.append(page)
    return count


def fifo(sequence, capacity):
    cache, count = OrderedDict(), 0
    for page in sequence:
        if page not in cache:
            count += 1
            if len(cache) == capacity:
                cache.popitem(last=False)
            cache[page] = None
    return count


def too_late(sequence, capacity):
    return lru(sequence, capacity + 1)


def farthest(cached, future):
    distance = {page: [*future, page].index(page) for page in cached}
    return max(distance, key=distance.get)


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""

    def n_blocks(n):
        return -(-n // 256)

    yield (
        check.state_bytes,
        lambda n, bits: {8: 2 * n + 8 * n_blocks(n), 32: 8 * n}[bits],
        [
            (lambda n, bits: {8: n + 4 * n_blocks(n), 32: 4 * n}[bits], "keeps two"),
            (lambda n, bits: n * bits // 4, "scales are missing"),
            (lambda n, bits: {8: 2 * n + 8 * (n // 256), 32: 8 * n}[bits], "round up"),
            (lambda n, bits: {8: 2 * n + 2 * n_blocks(n), 32: 8 * n}[bits], "four bytes"),
            (lambda n, bits: {8: 2 * n + 4 * n_blocks(n), 32: 8 * n}[bits], "each has its own"),
            (lambda n, bits: 8 * n, "fp32 in both"),
        ],
    )
    yield (
        check.lru_faults,
        lru,
        [
            (fifo, "FIFO"),
            (too_late, "one page too many"),
            (lambda s, c: len(s) - lru(s, c), "those are the hits"),
            (lambda s, c: check.faults(s, c, newest=True), "MRU"),
            (lambda s, c: lru(s, c) - len(set(s)), "first use"),
            (lambda s, c: len(set(s)), "faults again"),
        ],
    )
    yield (
        check.belady_victim,
        farthest,
        [
            (lambda c, f: min(c, key=lambda page: [*f, page].index(page)), "soonest"),
            (lambda c, f: max((p for p in c if p in f), key=f.index), "never used again"),
            (
                lambda c, f: max(c, key=lambda p: len(f) - f[::-1].index(p) if p in f else 99),
                "not at its last",
            ),
            (lambda c, f: c[0], "always the first page"),
            (lambda c, f: c[-1], "always the last page"),
        ],
    )
    yield (
        check.read_moment,
        lambda codes, absmax, levels: dequantize_blocks(codes, absmax, levels, 256),
        [
            (lambda c, a, t: t[c.int()], "scales are missing"),
            (lambda c, a, t: t[c.int()] * a[0], "one scale for all"),
            (lambda c, a, t: c * a.repeat_interleave(256)[: len(c)], "taken for numbers"),
            (lambda c, a, t: t[c.int()] / a.repeat_interleave(256)[: len(c)], "multiply"),
            (
                lambda c, a, t: (t[c.int()][: len(c) // 256 * 256].view(-1, 256) * a[:-1, None]).view(-1),
                "last block is missing",
            ),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


def test_the_residency_map_shows_what_the_log_says():
    events = [
        PageEvent(1, "a", "create", 1, 1),
        PageEvent(1, "a", "evict", 1, 0),
        PageEvent(1, "b", "create", 1, 1),
        PageEvent(2, "b", "evict", 1, 0),
        PageEvent(2, "a", "fault", 1, 1),
        PageEvent(2, "a", "hit", 1, 1),
    ]
    picture, steps = paging.residency(events, ["a", "b"])
    assert picture.tolist() == [[3, 0, 2, 1], [0, 3, 0, 0]] and steps == [1, 1, 2, 2]


def test_the_run_behind_the_explorer_pages_for_real(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    parameters = {str(n): torch.randn(64, 650) for n in range(6)}
    table = explore.paged_run(parameters, explore.OPTIMIZERS["AdamW"], 0.5, "lru")
    assert table.hit_rate == 0 and table.counts["fault"] == 18 and table.peak_bytes <= table.budget
    assert explore.paged_run(parameters, explore.OPTIMIZERS["AdamW"], 0.5, "mru").hit_rate > 0.3
    eight = explore.paged_run(parameters, lambda p: AdamW8bit(p), 1.0, "lru")
    assert eight.total_bytes < 0.3 * table.total_bytes


@pytest.fixture
def parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return {str(n): torch.randn(40, 40) for n in range(5)}


def test_the_explorer_draws_headless_and_refuses_nothing(parameters):
    figures = explorers.shown(explore, lambda: explore.paging_explorer(parameters))
    assert len(figures) == 2 and all(len(figure.axes) == 2 for figure in figures)
    with pytest.raises(ValueError, match="at least one parameter"):
        explore.paging_explorer({})


def test_the_explorer_has_a_control_for_each_choice(parameters):
    explorer = explorers.Explorer(explore, lambda: explore.paging_explorer(parameters), interactive=True)
    assert set(explorer.controls) == {"optimizer", "share", "policy"}
    before = explorers.title(explorer.figure_at_controls())
    explorer.controls["policy"].value = "mru"
    after = explorers.title(explorer.figure_at_controls())
    assert before.startswith("LRU") and after.startswith("MRU")


def test_paging_saves_a_run_only_where_much_trains():
    explorer = explorers.Explorer(explore, explore.card_explorer)
    few = explorer.figure(trains=8, card=8, checkpointing=True)
    many = explorer.figure(trains=explore.FULL, card=80, checkpointing=True)
    assert "changes nothing" in explorers.title(few) and "saves the run" in explorers.title(many)
    assert len(explorers.shown(explore, explore.card_explorer)) == 2
    interactive = explorers.Explorer(explore, explore.card_explorer, interactive=True)
    assert set(interactive.controls) == set(interactive.static[0])
