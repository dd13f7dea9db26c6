"""The pinned store on a simulated GPU: the same bits whenever its copies run, and no wait too few."""

import copy
import inspect
import pickle
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.hardware import Limits
from labkit.optim import page_table, pager, paging, pinned_store
from labkit.optim.page_store import Slot
from tests.optim.conftest import same
from tests.optim.paired_runs import ACTIONS, PairedRuns
from tests.optim.streams import SCHEDULES


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whenever_copies_run_the_bits_are_those_of_the_unpaged_optimizer(schedule, seed, monkeypatch):
    kind = ("SGD, momentum", "ours", "AdamW")[seed]
    runs = PairedRuns(monkeypatch, schedule, seed, kind, policy=("lru", "mru")[seed % 2], prefetch=seed != 2)
    runs.steps(2)
    for action in runs.random.choices(ACTIONS, k=10):
        action(runs)
    runs.check()
    runs.close()
    runs.steps(2)
    runs.check()


# --- every wait is needed


def without(module, line, which=0):
    """The module with one line of its source taken out, of several that read so the one that `which` says."""
    lines = inspect.getsource(module).splitlines()
    at = [n for n, text in enumerate(lines) if text.partition("  #")[0].strip() == line][which]
    lines[at] = lines[at][: len(lines[at]) - len(lines[at].lstrip())] + "pass"
    broken = types.ModuleType("broken")
    exec(compile("\n".join(lines), "broken", "exec"), broken.__dict__)
    return broken


def eventful(runs):
    """A course of events in which every wait matters."""
    runs.steps(3)
    runs.steps_on_another_stream()
    runs.steps(2)
    runs.check()
    runs.interrupted_read()
    runs.check()
    runs.steps()
    runs.close(keep_state=False)  # while the next page is being read
    runs.check(state=False)


def roomy(runs):
    """Pages stay where they were read to, on another stream than the one that they are last used on."""
    runs.steps(2)
    runs.steps_on_another_stream()
    runs.steps(2)
    runs.close()
    runs.steps()
    runs.check()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eventful_and_roomy_runs_go_well(schedule, monkeypatch):
    eventful(PairedRuns(monkeypatch, schedule))
    roomy(PairedRuns(monkeypatch, schedule, budget_bytes=10**7))


@pytest.mark.parametrize(
    "line",
    [
        "self.stream.wait_stream(torch.cuda.current_stream(self.device))",
        "self.under_way.append(copy)",
        "copy.event.record(self.stream)",
        "torch.cuda.current_stream(self.store.device).wait_event(self.event)",
        "memory.record_stream(torch.cuda.current_stream(self.device))",
        "self.stream.synchronize()",
    ],
)
def test_a_store_with_one_wait_less_gives_wrong_bits_in_the_simulation(line, monkeypatch):
    broken = without(pinned_store, line)
    with pytest.raises(AssertionError):
        for schedule in SCHEDULES:
            eventful(PairedRuns(monkeypatch, schedule, store=broken))


@pytest.mark.parametrize(
    ("line", "which", "course", "budget"),
    [
        ("self.wait(page)", 0, eventful, 200_000),
        ("self.wait(page)", 3, eventful, 200_000),
        ("self.store.let_go(page.frame)", 0, roomy, 10**7),
    ],
    ids=["when it is used", "when it is copied", "when its memory is freed"],
)
def test_so_does_a_page_that_is_not_waited_for(line, which, course, budget, monkeypatch):
    monkeypatch.setattr(paging, "PageTable", without(page_table, line, which).PageTable)
    with pytest.raises(AssertionError):
        for schedule in SCHEDULES:
            course(PairedRuns(monkeypatch, schedule, budget_bytes=budget))


# --- interrupts


def interrupt_at(count):
    """Raise a `KeyboardInterrupt` at the `count`-th line of the pager that runs from now on."""
    watched = {inspect.getsourcefile(module) for module in (page_table, pager, pinned_store)}
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            seen += 1
            if seen == count:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    return lambda: seen


@pytest.mark.slow
def test_interrupted_at_any_line_of_a_step_each_parameter_has_its_own_state(monkeypatch):
    runs = PairedRuns(monkeypatch, "at random")
    runs.steps(3)
    lines = interrupt_at(0)
    runs.steps()
    sys.settrace(None)
    assert lines() > 300
    for count in runs.random.sample(range(1, lines()), 8):
        runs = PairedRuns(monkeypatch, "at random", seed=count)
        runs.steps(3)
        before = (
            [p.detach().clone() for p in runs.plain[0]],
            copy.deepcopy(runs.plain[1].state_dict()["state"]),
        )
        interrupt_at(count)
        try:
            with pytest.raises(KeyboardInterrupt):
                runs.steps()
        finally:
            sys.settrace(None)
        runs.other_work()
        found, after = runs.state(), runs.plain[1].state_dict()["state"]
        for n, (p, q) in enumerate(zip(runs.plain[0], runs.paged[0], strict=True)):
            stepped = same(p.detach(), runs.gpu.read(q.detach()))
            assert stepped or same(before[0][n], runs.gpu.read(q.detach())), (count, n)
            expected = after if stepped else before[1]
            assert all(same(value, found[n][key]) for key, value in expected.get(n, {}).items()), (count, n)
        with torch.no_grad(), runs.gpu:  # from a checkpoint the run goes on
            for p, q in zip(runs.plain[0], runs.paged[0], strict=True):
                q.copy_(p)
        runs.load_checkpoint()
        runs.steps(2)
        runs.check()


# --- what is refused, and what is not wasted


def test_state_is_not_paged_while_a_graph_is_captured(monkeypatch):
    runs = PairedRuns(monkeypatch, "copies late")
    runs.steps(2)
    runs.gpu.capturing = True
    with pytest.raises(RuntimeError, match="cannot be paged while a CUDA graph is captured"):
        runs.steps()


def refusing(monkeypatch, message):
    empty = pinned_store.torch.empty

    def refuse(*arguments, pin_memory=False, **rest):
        if pin_memory:
            raise RuntimeError(message)
        return empty(*arguments, **rest)

    monkeypatch.setattr(pinned_store.torch, "empty", refuse)


def test_a_host_without_memory_to_pin_is_reported_before_anything_changes(monkeypatch):
    runs = PairedRuns(monkeypatch, "copies late")
    runs.steps(2)
    new = torch.nn.Parameter(runs.gpu.put(torch.ones(100, 100)))
    runs.paged[1].add_param_group({"params": [new]})
    new.grad = runs.gpu.put(torch.ones(100, 100))
    runs.step -= 1  # the plain run does not see the step that fails
    refusing(monkeypatch, "CUDA error: out of memory\nCUDA kernel errors might be …")
    with (
        runs.gpu,
        pytest.raises(MemoryError, match=r"needs 81,920 more bytes of pinned .* \(out of memory\)"),
    ):
        runs.paged[1].step()
    del runs.paged[1].param_groups[1]
    runs.step += 1
    runs.check()


def test_what_the_host_does_not_have_is_not_asked_for(monkeypatch):
    runs = PairedRuns(monkeypatch, "copies late")
    monkeypatch.setattr(pinned_store, "limits", lambda: Limits(1, 10**6, 4000, False))
    with pytest.raises(MemoryError, match=r"8,192 more bytes .* \(4,000 are free\)"):
        runs.pager.table.store.reserve(8000)


def test_detached_nothing_refers_to_pinned_memory(monkeypatch):
    runs = PairedRuns(monkeypatch, "copies late")
    runs.steps(2)
    assert any(block.pinned for block in runs.gpu.blocks.values())
    runs.close()
    runs.gpu.synchronize()
    assert not any(block.pinned for block in runs.gpu.blocks.values())


def test_a_pinned_store_cannot_be_copied_and_says_what_can(monkeypatch):
    store = PairedRuns(monkeypatch, "copies late").pager.table.store
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a page store cannot be copied or pickled"):
            attempt(store)


@given(st.integers(0, 2**21).map(lambda n: 4096 * n))
def test_buffers_are_powers_of_two_few_and_hold_little_more_than_the_page(nbytes):
    sizes = pinned_store.powers_of_two(nbytes)
    assert all(size & (size - 1) == 0 for size in sizes) and len(sizes) <= 5
    assert nbytes <= sum(sizes) <= nbytes * (1 + 1 / pinned_store.WASTE)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_the_bytes_of_a_tensor_lie_across_buffers_in_order(sizes, data):
    first = data.draw(st.integers(0, sum(sizes)))
    last = data.draw(st.integers(first, sum(sizes)))
    buffers = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
    tensor = torch.arange(1, last - first + 1, dtype=torch.uint8)
    for here, there in pinned_store.side_by_side(Slot(buffers, sum(sizes)), first, tensor):
        there.copy_(here)
    whole = torch.cat(buffers)
    assert torch.equal(whole[first:last], tensor) and whole.sum() == tensor.sum()
