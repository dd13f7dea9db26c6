"""Paged optimizers: the same bits at every budget, and what cannot be paged is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.optim.adamw import AdamW
from labkit.optim.paged_state import PagedState
from labkit.optim.paging import PagedAdamW, attach_paging, detach_paging
from labkit.training import checkpoint
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from tests.conftest import make_small_llama
from tests.optim.conftest import OPTIMIZERS, T, assert_same, budgets, make, run


@pytest.mark.parametrize("kind", ["ours", "ours, 8 bits", "AdamW, fused"])
@pytest.mark.parametrize("policy", ["lru", "mru"])
def test_paged_is_bit_identical_over_50_steps_at_every_budget(kind, policy, store):
    plain = make(kind)
    run(*plain, 50)
    for share, budget in budgets(kind, store).items():
        paged = make(kind)
        pager = attach_paging(paged[1], budget, store, policy, prefetch=share != 0.5)
        run(*paged, 50)
        assert_same(plain, paged)
        assert pager.table.peak_bytes <= budget
        assert (pager.table.counts["evict"] > 50) == (share < 1)
        pager.close()
        assert_same(plain, paged)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("prefetch", [True, False])
def test_any_optimizer_pages_and_stays_the_same(kind, prefetch, store):
    plain, paged = make(kind), make(kind)
    budget = budgets(kind, store)[0.25]
    with attach_paging(paged[1], budget, store, prefetch=prefetch) as pager:
        run(*plain, 12)
        run(*paged, 12)
        assert_same(plain, paged)
        assert pager.table.peak_bytes <= budget
    run(*plain, 3, first=12)
    run(*paged, 3, first=12)
    assert_same(plain, paged)


def test_bitsandbytes_optimizers_page_too(store):
    import bitsandbytes as bnb

    kind = lambda p: bnb.optim.AdamW8bit(p, lr=1e-2)  # noqa: E731
    plain, paged = make(kind), make(kind)
    attach_paging(paged[1], 45_056, store)
    run(*plain, 8)
    run(*paged, 8)
    for p, q in zip(plain[0], paged[0]):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ours", "ours, 8 bits", "AdamW, fused"])
def test_half_precision_parameters_page(kind, dtype, store):
    plain, paged = make(kind, dtype), make(kind, dtype)
    attach_paging(paged[1], 90_112, store)
    run(*plain, 10)
    run(*paged, 10)
    assert_same(plain, paged)


@pytest.mark.parametrize(
    "kind", sorted(OPTIMIZERS.keys() - {"Adafactor"})
)  # which divides by the number of numbers
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_parameter_is_stepped_like_any_other(kind, shape, store):
    plain, paged = make(kind, shapes=[(100,), shape, (7,)]), make(kind, shapes=[(100,), shape, (7,)])
    attach_paging(paged[1], 8192, store)
    for pair in (plain, paged):
        run(*pair, 6)
    assert_same(plain, paged)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=0, max_size=3), min_size=1, max_size=8),
    st.floats(0, 1),
    st.sampled_from(["lru", "mru"]),
    st.booleans(),
    st.sampled_from(["ours", "ours, 8 bits", "SGD, momentum"]),
)
def test_any_shapes_at_any_budget(tmp_path_factory, shapes, share, policy, prefetch, kind):
    store = tmp_path_factory.mktemp("store")
    plain, paged = make(kind, shapes=shapes), make(kind, shapes=shapes)
    pager = attach_paging(paged[1], 2**40, store)
    largest, total = max(p.nbytes for p in pager.table.pages.values()), pager.table.total_bytes
    pager.close()
    budget = max(1, largest + int(share * (total - largest)))
    with attach_paging(paged[1], budget, store, policy, prefetch=prefetch) as pager:
        run(*plain, 7)
        run(*paged, 7)
        assert_same(plain, paged)
        assert pager.table.peak_bytes <= budget


def test_attaching_in_the_middle_of_a_run_and_detaching_changes_nothing(store):
    plain, paged = make("ours"), make("ours")
    run(*plain, 12)
    run(*paged, 4)
    pager = attach_paging(paged[1], 170_000, store)
    run(*paged, 4, first=4)
    assert pager.table.resident_bytes > 0
    detach_paging(paged[1])
    assert pager.table.resident_bytes == 0 and not any(page.state for page in pager.table.pages.values())
    detach_paging(paged[1])  # once more does nothing
    assert type(paged[1].state) is not PagedState and "step" not in paged[1].__dict__
    assert not hasattr(paged[1], "pager")
    run(*paged, 4, first=8)
    assert_same(plain, paged)


def test_several_paged_optimizers_keep_out_of_each_others_way(store):
    plain, paged = [make("ours"), make("ours, 8 bits")], [make("ours"), make("ours, 8 bits")]
    for _, optimizer in paged:
        attach_paging(optimizer, 170_000, store)
    for step in range(6):
        for pair in plain + paged:
            run(*pair, 1, first=step)
    paged[0][1].pager.close()
    for step in range(6, 9):
        for pair in plain + paged:
            run(*pair, 1, first=step)
    for a, b in zip(plain, paged):
        assert_same(a, b)


# --- what is refused


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"budget_bytes": -1}, "positive whole number"),
        ({"budget_bytes": 0}, "positive whole number"),
        ({"budget_bytes": 1e6}, "positive whole number"),
        ({"budget_bytes": True}, "positive whole number"),
        ({"budget_bytes": "1GB"}, "positive whole number"),
        ({"budget_bytes": 10**6, "policy": "fifo"}, "choose one of"),
        ({"budget_bytes": float("nan")}, "positive whole number"),
        ({"budget_bytes": 10**6, "min_elements": -1}, "at least 0"),
        ({"budget_bytes": 10**6, "prefetch": "no"}, "prefetch='no' is not known"),
        ({"budget_bytes": 10**6, "fused_into_backward": 1}, "fused_into_backward=1 is not known"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings_, message, store):
    with pytest.raises(ValueError, match=message):
        attach_paging(make("ours")[1], store=store, **settings_)


def test_attaching_twice_and_to_what_cannot_be_paged_is_refused(store, tmp_path):
    parameters, optimizer = make("ours")
    attach_paging(optimizer, 10**6, store)
    with pytest.raises(ValueError, match="paged already"):
        attach_paging(optimizer, 10**6, store)
    with pytest.raises(TypeError, match="LBFGS"):
        attach_paging(T.LBFGS(parameters), 10**6, store)

    class KeepsLists(AdamW):
        def init_state(self, p, state):
            super().init_state(p, state)
            state["history"] = [torch.zeros(3)]

    with pytest.raises(TypeError, match="'history'.* is a list"):
        attach_paging(KeepsLists(parameters), 10**6, store)

    class Counts(AdamW):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1

    counting = Counts(parameters)
    attach_paging(counting, 10**6, store)
    parameters[0].grad = torch.ones_like(parameters[0])
    with pytest.raises(RuntimeError, match="changes \\['calls'\\]"):
        counting.step()
    replaced = AdamW(parameters)
    replaced.step = lambda: None
    with pytest.raises(ValueError, match="has replaced optimizer.step"):
        attach_paging(replaced, 10**6, store)
    with pytest.raises(ValueError, match="all on the CPU or all on one GPU"):
        attach_paging(AdamW([torch.nn.Parameter(torch.ones(2, device="meta"))]), 10**6, store)


# --- in the rest of labkit


def test_paged_adamw_is_adamw(store):
    plain, paged = make("ours"), make(lambda p: PagedAdamW(p, 1e-2, budget_bytes=170_000, store=store))
    run(*plain, 5)
    run(*paged, 5)
    assert_same(plain, paged)
    assert labkit.PagedAdamW is PagedAdamW and labkit.attach_paging is attach_paging


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_training_run_with_a_budget_has_the_losses_of_one_without_and_resumes(
    optimizer, records, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))

    def losses(**changes):
        model = make_small_llama()
        torch.manual_seed(3)
        add_lora(model, LoRAConfig(r=16))
        config = TrainConfig(steps=6, batch_size=2, optimizer=optimizer, progress=False, **changes)
        return train(model, tokenizer, records, config).losses

    expected = losses()
    assert losses(state_budget_bytes=60_000) == expected
    save = checkpoint.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    folder = {"checkpoint_folder": tmp_path / "run", "checkpoint_every": 3}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        assert losses(**folder, state_budget_bytes=60_000) == expected[:3]
    assert losses(**folder) == expected, "a run that was paged goes on without paging"
