"""The state of a paged optimizer as a dictionary: checkpoints, look-ups, copies."""

import copy

import pytest
import torch

from labkit.optim.paged_state import PagedState
from labkit.optim.paging import attach_paging
from tests.optim.conftest import assert_same, make, run


def test_checkpoints_are_those_of_the_plain_optimizer_in_both_directions(store):
    for kind in ("ours", "ours, 8 bits", "AdamW, fused"):
        plain, paged = make(kind), make(kind)
        attach_paging(paged[1], 170_000, store)
        run(*plain, 6)
        run(*paged, 6)
        from_plain, from_paged = copy.deepcopy(plain[1].state_dict()), paged[1].state_dict()
        paged_again, plain_again = make(kind), make(kind)
        for target, source in ((paged_again, plain), (plain_again, paged)):
            with torch.no_grad():
                for p, q in zip(target[0], source[0]):
                    p.copy_(q)
        pager = attach_paging(paged_again[1], 170_000, store)
        paged_again[1].load_state_dict(from_plain)
        plain_again[1].load_state_dict(from_paged)
        for pair in (plain, paged, paged_again, plain_again):
            run(*pair, 6, first=6)
        for pair in (paged, paged_again, plain_again):
            assert_same(plain, pair)
        assert pager.table.peak_bytes <= 170_000


def test_a_state_dict_is_a_snapshot_that_later_steps_do_not_change(store):
    paged = make("ours")
    attach_paging(paged[1], 170_000, store)
    run(*paged, 3)
    taken = paged[1].state_dict()["state"]
    kept = copy.deepcopy(taken)
    run(*paged, 3, first=3)
    for n, state in kept.items():
        assert all(torch.equal(value, taken[n][key]) for key, value in state.items())


def test_looking_state_up_pages_it_in_and_assigning_pages_it_out(store):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 170_000, store)
    run(*plain, 5)
    run(*paged, 5)
    for p, q in zip(*(pair[0] for pair in (plain, paged))):
        assert (q in paged[1].state) and set(paged[1].state[q]) == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(paged[1].state[q]["exp_avg"], plain[1].state[p]["exp_avg"])
        assert pager.table.resident_bytes <= 170_000
        for pair, key in ((plain, p), (paged, q)):
            pair[1].state[key] = {k: v * 2 if v.dim() else v for k, v in pair[1].state[key].items()}
    run(*plain, 5, first=5)
    run(*paged, 5, first=5)
    assert_same(plain, paged)


def test_a_deep_copy_of_a_paged_optimizer_is_a_plain_one_with_all_state(store):
    paged = make("AdamW")
    attach_paging(paged[1], 170_000, store)
    run(*paged, 3)
    twin = copy.deepcopy(paged[1])
    assert not isinstance(twin.state, PagedState) and len(twin.state) == len(paged[1].state)
    del twin.state  # the copy's own parameters are its keys
    run(*paged, 2, first=3)


def test_a_paged_state_has_the_keys_of_a_plain_one_and_forgets_what_is_deleted(store):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 170_000, store)
    assert len(pager.state) == 0 and paged[0][0] not in pager.state, "planned, and not there yet"
    run(*plain, 2)
    run(*paged, 2)
    state = paged[1].state
    assert state is pager.state and len(state) == len(plain[1].state) == len(list(state))
    del state[paged[0][0]]
    assert paged[0][0] not in state and state.get(paged[0][0], "none") == "none"
    with pytest.raises(KeyError):
        del state[paged[0][0]]


def test_8_bit_state_loads_under_a_budget_that_holds_it_in_8_bits_only(store):
    plain, paged = make("ours, 8 bits"), make("ours, 8 bits")
    pager = attach_paging(paged[1], 50_000, store)
    run(*plain, 3)
    run(*paged, 3)
    paged[1].load_state_dict(copy.deepcopy(plain[1].state_dict()))
    assert paged[1].state is pager.state and pager.table.largest.nbytes < 50_000
    for pair in (plain, paged):
        run(*pair, 3, first=3)
    assert_same(plain, paged)
