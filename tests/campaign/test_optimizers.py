"""Optimizers under gradients of any size and order: how far a single weight may move, and paging to the bit."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from labkit.optim.adamw import AdamW8bit
from labkit.optim.moments import smallest_root
from labkit.optim.paging import attach_paging, detach_paging
from tests.campaign.harness import rounds
from tests.optim.conftest import assert_same, make, run

LR = 1e-3
ROWS, WIDTH = 12, 50  # 600 numbers: two whole blocks of 256, and a part of one
MORE_THAN_TORCH = 4  # times as far as with exact moments

# kind of a step, power of ten of its size, seed
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["dense", "rows", "rows", "zero", "burst", "tiny"]),
        st.integers(-12, 6),
        st.integers(0, 10**6),
    ),
    min_size=2,
    max_size=24,
)
BETAS = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.99, 0.999), (0.0, 0.99)])


def gradients(steps, decades):
    """Of a matrix whose numbers have sizes of their own, over so many powers of ten."""
    sizes = 10 ** (-decades * torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))
    for kind, power, seed in steps:
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.randn(ROWS, WIDTH, generator=generator) * sizes * 10.0**power
        if kind == "rows":
            gradient[torch.rand(ROWS, generator=generator) < 0.8] = 0.0
        elif kind == "zero":
            gradient.zero_()
        elif kind == "burst":
            gradient.view(-1)[int(torch.randint(ROWS * WIDTH, (), generator=generator))] = 10.0 ** (power + 8)
        elif kind == "tiny":
            gradient *= 1e-9
        yield gradient


@settings(max_examples=rounds(60, 4000), deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 10), BETAS)
def test_no_step_of_8_bit_adamw_is_longer_than_exact_adamws_longest(steps, decades, betas):
    p = Parameter(torch.zeros(ROWS, WIDTH))
    optimizer = AdamW8bit([p], lr=LR, betas=betas, weight_decay=0.0, min_8bit_size=0)
    beta1, beta2 = betas
    for t, gradient in enumerate(gradients(steps, decades), start=1):
        before, p.grad = p.detach().clone(), gradient
        optimizer.step()
        longest = LR / smallest_root(*betas) * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        assert (p.detach() - before).abs().max() <= longest * (1 + 1e-4) + 1e-8


@settings(max_examples=rounds(40, 2000), deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 10), st.integers(1, 12))
def test_no_weight_ends_much_farther_away_than_with_exact_moments(steps, decades, times):
    weights = [Parameter(torch.zeros(ROWS, WIDTH)) for _ in range(2)]
    optimizers = (
        AdamW8bit(weights[:1], lr=LR, weight_decay=0.0, min_8bit_size=0),
        torch.optim.AdamW(weights[1:], lr=LR, weight_decay=0.0, foreach=False),
    )
    for gradient in gradients(steps * times, decades):
        for p, optimizer in zip(weights, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    mine, theirs = (p.detach().abs().max().item() for p in weights)
    assert mine <= MORE_THAN_TORCH * theirs + 1e-6


@settings(max_examples=rounds(15, 400), deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["ours", "ours, 8 bits", "AdamW, fused", "SGD, momentum"]),
    shapes=st.lists(st.lists(st.integers(0, 50), max_size=2), min_size=1, max_size=5),
    acts=st.lists(
        st.tuples(st.sampled_from(["step", "step", "save", "attach", "detach", "copy"]), st.floats(0, 1)),
        min_size=2,
        max_size=8,
    ),
    policy=st.sampled_from(["lru", "mru"]),
    prefetch=st.booleans(),
)
def test_paging_saving_and_loading_at_any_moment_change_no_bit(
    tmp_path_factory, kind, shapes, acts, policy, prefetch
):
    store = tmp_path_factory.mktemp("store")
    plain, paged = make(kind, shapes=shapes), make(kind, shapes=shapes)

    def attach(optimizer, share):
        pager = attach_paging(optimizer, 2**40, store)
        pages = [page.nbytes for page in pager.table.pages.values()]
        detach_paging(optimizer)
        budget = max(1, *pages, int(share * sum(pages)))
        return attach_paging(optimizer, budget, store, policy, prefetch=prefetch)

    attach(paged[1], 0.5)
    for moment, (act, share) in enumerate(acts):
        if act == "save":  # into a new one, as after a kill
            saved = copy.deepcopy(paged[1].state_dict())
            detach_paging(paged[1], keep_state=False)
            parameters, optimizer = make(kind, shapes=shapes)
            with torch.no_grad():
                for new, old in zip(parameters, paged[0], strict=True):
                    new.copy_(old)
            attach(optimizer, share)
            optimizer.load_state_dict(saved)
            paged = parameters, optimizer
        elif act == "copy":
            detached = copy.deepcopy(paged)
            detach_paging(paged[1], keep_state=False)
            paged = detached
        elif act == "attach" and not hasattr(paged[1], "pager"):
            attach(paged[1], share)
        elif act == "detach":
            detach_paging(paged[1])
        for each in (plain, paged):
            run(*each, 1, first=moment)
        assert_same(plain, paged)
        if hasattr(paged[1], "pager"):
            assert paged[1].pager.table.peak_bytes <= paged[1].pager.table.budget
    detach_paging(paged[1])
