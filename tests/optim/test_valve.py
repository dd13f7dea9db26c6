"""A budget that changes between steps, and state that makes room where a pass runs out of memory."""

import errno
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.optim import page_store
from labkit.optim.paging import attach_paging
from labkit.optim.saved_state import new_state
from labkit.optim.valve import is_out_of_memory
from tests.optim.conftest import T, assert_same, make, run

LARGEST, TOTAL = (
    163_840,
    596_000,
)  # bytes of state, of the largest parameter and of all; the latter rounded up


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(LARGEST, TOTAL), min_size=1, max_size=5),
    st.sampled_from(["lru", "mru"]),
    st.booleans(),
)
def test_whatever_the_budgets_between_steps_the_bits_are_the_same(
    tmp_path_factory, budgets, policy, prefetch
):
    plain, paged = make("ours"), make("ours")
    with attach_paging(paged[1], TOTAL, tmp_path_factory.mktemp("store"), policy, prefetch=prefetch) as pager:
        for step, budget in enumerate(budgets):
            pager.set_budget(budget)
            assert pager.table.resident_bytes <= budget == pager.table.budget
            run(*plain, 2, first=2 * step)
            run(*paged, 2, first=2 * step)
            assert pager.table.resident_bytes <= budget
        assert_same(plain, paged)


def test_a_lower_budget_pages_out_at_once_and_a_higher_one_lets_state_stay(store):
    parameters, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store, prefetch=False)
    run(parameters, optimizer, 4)
    table = pager.table
    assert table.resident_bytes > LARGEST
    pager.set_budget(LARGEST)
    assert table.resident_bytes <= LARGEST
    pager.set_budget(TOTAL)
    run(parameters, optimizer, 4, first=4)
    before = table.counts["fault"]
    run(parameters, optimizer, 2, first=8)
    assert table.counts["fault"] == before


def test_a_budget_that_cannot_be_is_refused_and_the_old_one_stays(store):
    _, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store)
    for budget in (0, -1, 1e6, True, "1 GB", None):
        with pytest.raises(ValueError, match="must be a positive whole number of bytes"):
            pager.set_budget(budget)
    with pytest.raises(ValueError, match="budget_bytes=1000 is less than .* give at least 163840"):
        pager.set_budget(1000)
    assert pager.table.budget == TOTAL
    pager.close()
    for call in (lambda: pager.set_budget(TOTAL), lambda: pager.make_room_for(list)):
        with pytest.raises(ValueError, match="paging is detached from this optimizer"):
            call()


def test_a_budget_may_be_set_before_there_is_any_state(store):
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    pager = attach_paging(T.SGD([frozen], lr=0.1), 10, store)
    pager.set_budget(1)
    assert pager.table.budget == 1


# --- the valve


def passes(parameters, room, seen, error=torch.OutOfMemoryError):
    """Gradients that are random, if the state in memory leaves room; a failed try leaves half of them behind."""

    def attempt():
        drawn = [torch.randn_like(p) for p in parameters]
        for p, gradient in list(zip(parameters, drawn, strict=True))[: len(drawn) // 2]:
            p.grad = gradient
        seen.append(room())
        if seen[-1] < 0:
            raise error("no room")
        for p, gradient in zip(parameters, drawn, strict=True):
            p.grad = gradient
        return sum(gradient.sum() for gradient in drawn).item()

    return attempt


def test_state_makes_room_and_the_run_is_that_of_a_machine_with_room_enough(store):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], TOTAL, store)
    needs = [0, 0, 200_000, 300_000, 450_000, 450_000]
    losses: dict = {"plain": [], "paged": []}
    torch.manual_seed(0)
    for _ in needs:
        losses["plain"].append(passes(plain[0], lambda: 0, [])())
        plain[1].step()
        plain[1].zero_grad()
    torch.manual_seed(0)
    budgets, tries = [], []
    for need in needs:
        room = lambda need=need: TOTAL - need - pager.table.resident_bytes  # noqa: E731
        seen: list[int] = []
        losses["paged"].append(pager.make_room_for(passes(paged[0], room, seen)))
        paged[1].step()
        paged[1].zero_grad()
        budgets.append(pager.table.budget)
        tries.append(len(seen))
    assert losses["plain"] == losses["paged"], "a second try draws the same numbers"
    assert_same(plain, paged)
    assert tries[:2] == [1, 1] and max(tries) > 1 and tries[-1] == 1, "once there is room, no pass fails"
    assert budgets == sorted(budgets, reverse=True) and LARGEST <= budgets[-1] < TOTAL / 2


def test_in_the_end_all_state_goes_out_and_then_the_error_is_the_passes_own(store):
    parameters, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store)
    run(parameters, optimizer, 3)
    optimizer.zero_grad()
    seen: list[int] = []
    room = lambda: -pager.table.resident_bytes  # noqa: E731  # only without any state there is enough
    pager.make_room_for(passes(parameters, room, seen))
    assert seen[-1] == 0 and seen == sorted(seen) and len(seen) <= 4
    optimizer.zero_grad()
    with pytest.raises(torch.OutOfMemoryError, match="no room") as caught:
        pager.make_room_for(passes(parameters, lambda: -1, seen))
    assert caught.value.__notes__ == ["no optimizer state is left in memory that could make room"]
    assert not isinstance(caught.value.__context__, torch.OutOfMemoryError)


def test_gradients_that_are_there_already_are_not_lost(store):
    parameters, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store)
    parameters[2].grad = torch.ones_like(parameters[2])
    with pytest.raises(ValueError, match="there are gradients already.*optimizer.zero_grad"):
        pager.make_room_for(passes(parameters, lambda: 0, []))
    assert torch.equal(parameters[2].grad, torch.ones_like(parameters[2])) and parameters[0].grad is None


def test_what_is_stepped_in_backward_is_not_repeated(store):
    _, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store, fused_into_backward=True)
    with pytest.raises(ValueError, match="has stepped some parameters already"):
        pager.make_room_for(list)


def test_another_error_is_no_lack_of_memory(store):
    parameters, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store)
    run(parameters, optimizer, 3)
    optimizer.zero_grad()
    seen: list[int] = []
    with pytest.raises(ValueError, match="no room"):
        pager.make_room_for(passes(parameters, lambda: -1, seen, error=ValueError))
    assert len(seen) == 1 and pager.table.budget == TOTAL


def test_when_a_try_is_repeated_nothing_of_the_failed_one_is_alive(store):
    parameters, optimizer = make("ours")
    pager = attach_paging(optimizer, TOTAL, store)
    run(parameters, optimizer, 3)
    optimizer.zero_grad()
    alive: list[weakref.ref] = []

    def attempt():
        assert not any(reference() for reference in alive)
        if not alive:
            activation = torch.nn.Module()
            activation.itself = activation  # in a cycle, as graphs may be
            alive.append(weakref.ref(activation))
            raise MemoryError("no room")

    gc.disable()
    try:
        pager.make_room_for(attempt)
    finally:
        gc.enable()
    assert len(alive) == 1


def test_errors_of_memory_are_told_from_others():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried …"
        ),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    for error in (
        RuntimeError("shape mismatch"),
        OSError(errno.ENOSPC, "No space left"),
        KeyboardInterrupt(),
    ):
        assert not is_out_of_memory(error)


def test_a_store_that_fails_while_room_is_made_says_so_and_loses_nothing(store, monkeypatch):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], TOTAL, store)
    for pair in (plain, paged):
        run(*pair, 3)

    def full(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(page_store.os, "pwrite", full)
        with pytest.raises(OSError, match="Input/output"):
            pager.set_budget(LARGEST)
    for pair in (plain, paged):
        run(*pair, 3, first=3)
    assert_same(plain, paged)


def test_the_step_count_of_a_fused_optimizer_is_planned_where_it_will_be():
    parameter = torch.nn.Parameter(torch.ones(10))
    for fused, device in ((True, "meta"), (False, "cpu")):
        optimizer = T.AdamW([parameter], fused=fused)
        state = new_state(optimizer, parameter, optimizer.param_groups[0])
        assert state["step"].device.type == device
