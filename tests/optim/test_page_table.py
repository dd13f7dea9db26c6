"""Memory under the budget, as the process and the operating system see it; the policies, and the log."""

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from labkit.optim.adamw import AdamW
from labkit.optim.paged_state import PagedState
from labkit.optim.paging import attach_paging
from tests.optim.conftest import SHAPES, assert_same, make, run


def storages_alive():
    """{address: bytes} of the memory of all CPU tensors of at least 4096 numbers that Python knows."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() >= 4096
    }


def bytes_alive_during_updates(budget: int, store: str) -> list[int]:
    """What is alive besides parameters and gradients, after every update; for a process of its own."""
    seen, known = [], []

    class Watching(AdamW):
        def update(self, p, grad, state, group):
            super().update(p, grad, state, group)
            own = {t.data_ptr() for q in known for t in (q, q.grad) if t is not None}
            seen.append(sum(size for at, size in storages_alive().items() if at not in own))

    parameters, optimizer = make(lambda p: Watching(p, lr=1e-2), shapes=[(64, 64)] * 12)
    known.extend(parameters)
    attach_paging(optimizer, budget, store)
    seen.clear()  # of the trial step
    run(parameters, optimizer, 4)
    return seen


@pytest.mark.slow
def test_the_tensors_alive_during_every_update_stay_under_the_budget(store):
    budget, page = 3 * 36_864, 36_864
    # in a process of its own, where no other test has left a tensor behind
    code = f"from tests.optim.test_page_table import *; print(*bytes_alive_during_updates({budget}, {str(store)!r}))"
    root = Path(__file__).resolve().parents[2]
    command = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    seen = [int(v) for v in command.stdout.split()]
    assert len(seen) > 30 and max(seen) <= budget
    assert max(seen) > 2 * page, "the budget is used, and the count sees the state"


RESIDENT = """
    import re, sys, torch
    from labkit.optim.paging import attach_paging
    budget, store = int(sys.argv[1]), sys.argv[2]
    def status(key):
        return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
    # 2 MB each, and 8 bytes of state per number: 201 MB
    parameters = [torch.nn.Parameter(torch.zeros(1 << 19)) for _ in range(48)]
    gradient = torch.full((1 << 19,), 1e-3)
    for p in parameters:
        p.grad = gradient
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    # warm up what torch loads on first use
    optimizer_of_one = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1 << 19))])
    optimizer_of_one.param_groups[0]["params"][0].grad = gradient
    optimizer_of_one.step()
    del optimizer_of_one
    if budget:
        attach_paging(optimizer, budget, store)
    before = status("VmRSS")
    for _ in range(3):
        optimizer.step()
    print(status("VmHWM") - before, status("RssAnon") + status("RssFile") + status("RssShmem") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads resident memory from /proc")
def test_resident_memory_of_the_process_falls_to_the_budget(store):
    def measure(budget):
        command = [sys.executable, "-c", textwrap.dedent(RESIDENT), str(budget), str(store)]
        return [
            int(v) for v in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        ]

    peak, after = measure(0)
    assert peak > 195e6 and after > 195e6, "unpaged, the state is resident"
    budget = 30_000_000
    peak, after = measure(budget)
    # the optimizer's own temporaries, 2 MB per parameter, and what the C library holds until told to let go
    assert after <= budget + 4e6 and peak <= budget + 16e6


def test_the_minimum_budget_is_one_parameter_and_less_is_refused_with_the_number(store):
    _, optimizer = make("ours")
    with pytest.raises(
        ValueError, match=r"budget_bytes=1000 .* parameter 1, 163840 bytes.*give at least 163840"
    ):
        attach_paging(optimizer, 1000, store)
    assert type(optimizer.state) is not PagedState and "step" not in optimizer.__dict__
    attach_paging(optimizer, 163840, store)


def test_min_elements_keeps_small_tensors_in_memory_and_out_of_the_budget(store):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 1, store, min_elements=100_000)
    run(*plain, 4)
    run(*paged, 4)
    assert_same(plain, paged)
    table = pager.table
    numbers = sum(p.numel() for p in paged[0])
    assert table.bytes_out == table.bytes_in == table.total_bytes == 0
    assert table.exempt_bytes == 8 * numbers + 4 * len(SHAPES), (
        "the rule of 100,000 elements, and nothing is paged"
    )


# --- the log, and the policies


@pytest.mark.parametrize("pages", [1, 3, 7])
def test_on_a_cycle_lru_never_hits_and_mru_hits_as_often_as_beladys_rule(pages, store):
    n, steps = 8, 20
    counts = {}
    for policy in ("lru", "mru"):
        parameters, optimizer = make("ours", shapes=[(512,)] * n)
        attach_paging(optimizer, pages * 8192, store, policy, prefetch=False)
        for _ in range(steps):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        counts[policy] = optimizer.pager.table
    assert counts["lru"].hit_rate == 0 and counts["lru"].counts["fault"] == n * (steps - 1)
    # Belady's rule by brute force over the same sequence, with a cache that is empty after the first step
    sequence, cached, hits = [i % n for i in range(n * (steps - 1))], set(), 0
    for at, page in enumerate(sequence):
        hits += page in cached
        if page not in cached and len(cached) == pages:
            following = lambda q: next((k for k in range(at + 1, len(sequence)) if sequence[k] == q), 10**9)  # noqa: B023, E731
            cached.discard(max(cached, key=following))
        cached.add(page)
    assert counts["mru"].counts["hit"] == pytest.approx(hits, abs=pages)


def test_the_log_adds_up_to_the_counts_and_the_resident_bytes(store):
    paged = make("ours")
    pager = attach_paging(paged[1], 250_000, store)
    run(*paged, 6)
    resident, inside = 0, set()
    for event in pager.table.events:
        if event.kind in ("create", "fault", "prefetch"):
            assert event.name not in inside
            inside.add(event.name)
            resident += event.nbytes
        elif event.kind == "evict":
            inside.remove(event.name)
            resident -= event.nbytes
        else:
            assert event.name in inside
        assert event.resident == resident <= 250_000
    kinds = [event.kind for event in pager.table.events]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        k: v for k, v in pager.table.counts.items() if v
    }
    assert {event.step for event in pager.table.events} == set(range(1, 7))
