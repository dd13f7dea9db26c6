"""A paged state belongs to one process: what a forked, spawned or copied one may do with it."""

import copy
import multiprocessing
import os
import pickle
import sys

import pytest
import torch
from torch.nn import Parameter
from torch.utils.data import DataLoader

from labkit.optim.paging import PagedAdamW, attach_paging, detach_paging
from tests.optim.conftest import assert_same, make, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing forks there")


def what_happens_in_a_child(work) -> str:
    """What `work()` returns in a forked process, or the message of its exception."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def pair(prefetch, store):
    plain, paged = make("AdamW"), make("AdamW")
    attach_paging(paged[1], 170_000, store, prefetch=prefetch)
    for each in (plain, paged):
        run(*each, 3)
    return plain, paged


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_forked_process_can_change_nothing_of_its_parents_state(prefetch, store):
    plain, paged = pair(prefetch, store)
    parameters, optimizer = paged
    attempts = {
        "step": lambda: run(*paged, 2, first=3),
        "state_dict": optimizer.state_dict,
        "load": lambda: optimizer.load_state_dict(plain[1].state_dict()),
        "look up": lambda: [optimizer.state[p] for p in parameters],
        "assign": lambda: optimizer.state.__setitem__(parameters[0], {}),
        "copy": lambda: copy.deepcopy(optimizer),
        "detach": lambda: detach_paging(optimizer),
    }
    for name, attempt in attempts.items():
        answer = what_happens_in_a_child(attempt)
        assert answer.startswith("RuntimeError: process ") and "was forked from" in answer, (name, answer)
    for each in (plain, paged):
        run(*each, 4, first=3)
    assert_same(plain, paged)


def test_a_forked_process_can_go_on_with_a_state_that_was_saved_before(store):
    plain, paged = pair(True, store)
    saved = paged[1].state_dict()

    def go_on():
        detach_paging(paged[1], keep_state=False)
        paged[1].load_state_dict(saved)
        run(*paged, 3, first=3)
        return [p.double().sum().item() for p in paged[0]]

    answer = what_happens_in_a_child(go_on)
    run(*plain, 3, first=3)
    assert answer == str([p.double().sum().item() for p in plain[0]])
    run(*paged, 3, first=3)
    assert_same(plain, paged)


def test_workers_of_a_data_loader_leave_it_alone(store):
    plain, paged = pair(True, store)
    for step, batch in enumerate(DataLoader(torch.arange(8.0), batch_size=4, num_workers=2)):
        assert len(batch) == 4
        for each in (plain, paged):
            run(*each, 1, first=3 + step)
    assert_same(plain, paged)


def in_a_new_process(pickled: bytes) -> bytes:
    """Two more steps with a pickled (parameters, optimizer)."""
    parameters, optimizer = pickle.loads(pickled)
    run(parameters, optimizer, 2, first=3)
    return pickle.dumps((parameters, optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_new_process_gets_a_copy_with_all_state_in_memory(method, store):
    plain, paged = pair(True, store)
    with multiprocessing.get_context(method).Pool(1) as pool:
        theirs = pickle.loads(pool.apply(in_a_new_process, (pickle.dumps(paged),)))
    assert_same(plain, paged)
    run(*plain, 2, first=3)
    assert_same(plain, theirs)


def test_a_pickled_optimizer_is_a_plain_one_that_goes_on_with_the_same_bits(store):
    plain, paged = pair(True, store)
    run(*plain, 2, first=3)
    assert_same(plain, pickle.loads(in_a_new_process(pickle.dumps(paged))))
    optimizer = PagedAdamW([Parameter(torch.ones(4))], budget_bytes=10**5, store=store)
    assert not hasattr(copy.deepcopy(optimizer), "pager") and optimizer.pager.table.pages


def test_a_pager_cannot_be_copied_and_says_what_can(store):
    _, paged = pair(True, store)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match="a page store cannot be copied or pickled.*Copy or pickle the optimizer"
        ):
            attempt(paged[1].pager.table.store)
        with pytest.raises(TypeError):
            attempt(paged[1].pager)
