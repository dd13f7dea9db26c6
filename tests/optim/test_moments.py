"""Moments in 8 bits: the largest move of any weight, beside torch's and bitsandbytes'."""

import logging

import pytest
import torch
from torch.nn import Parameter

from labkit.hardware import set_fast
from labkit.optim.adamw import AdamW8bit
from labkit.optim.moments import MAPS, quantize_moment, quantize_moments, smallest_root

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
LR = 1e-3


def torch_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)


def ours(parameters):
    return AdamW8bit(parameters, lr=LR, weight_decay=0.0)


def bitsandbytes(parameters):
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, lr=LR, weight_decay=0.0)


def moved(make, gradients, dtype=torch.float32):
    """(weights, longest move of a single weight in a single step) from weights of zero."""
    p = Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer, longest = make([p]), 0.0
    for gradient in gradients:
        before = p.detach().clone()
        p.grad = gradient.to(dtype)
        optimizer.step()
        longest = max(longest, (p.detach() - before).nan_to_num().abs().max().item())
    return p.detach().float(), longest


def like_an_embeddings(steps, decades, seed, rows=384, width=64, hit=16):
    """A few rows a step, each of its own size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-decades * torch.rand(rows, 1, generator=generator))
    for _ in range(steps):
        gradient = torch.zeros(rows, width)
        chosen = torch.randint(rows, (hit,), generator=generator)
        gradient[chosen] = torch.randn(hit, width, generator=generator) * sizes[chosen]
        yield gradient


def one_row_in_two(steps, at=20):
    """Every second row always has a gradient, and the others one, a hundredth of it, in a single step."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        gradient = torch.zeros(48, 128)
        gradient[::2] = torch.randn(24, 128, generator=generator)
        if step == at:
            gradient[1::2] = 0.01 * torch.randn(24, 128, generator=generator)
        yield gradient


def test_a_gradient_that_stops_does_not_leave_a_zero_under_a_first_moment():
    gradients = [torch.ones(8192), torch.ones(8192)]
    gradients[0][::2], gradients[1][::2] = 1e-4, 0.0
    (theirs, _), (mine, _) = moved(torch_adamw, gradients), moved(ours, gradients)
    assert theirs[0].item() == pytest.approx(-0.00167, abs=1e-5)
    assert (mine.abs() <= theirs.abs() + 1e-6).all(), "shorter steps at most: v is rounded up"


@pytest.mark.parametrize("decades", [2, 4, 6, 8])
def test_rows_of_an_embedding_move_no_farther_than_with_exact_moments(decades):
    gradients = list(like_an_embeddings(60, decades, seed=decades))
    farthest = {make.__name__: moved(make, gradients)[0].abs().max().item() for make in (torch_adamw, ours)}
    assert farthest["ours"] <= 1.2 * farthest["torch_adamw"]
    assert farthest["ours"] <= 1.2 * moved(bitsandbytes, gradients)[0].abs().max().item()


def test_a_row_without_a_gradient_comes_to_rest():
    gradients = list(one_row_in_two(200))
    rows = {make.__name__: moved(make, gradients)[0][1::2] for make in (torch_adamw, ours, bitsandbytes)}
    farthest = {name: row.abs().max().item() for name, row in rows.items()}
    assert farthest["ours"] <= 1.1 * farthest["torch_adamw"]
    assert torch.equal(rows["ours"], moved(ours, gradients[:120])[0][1::2]), (
        "nothing moves a hundred steps later"
    )
    assert not torch.equal(rows["bitsandbytes"], moved(bitsandbytes, gradients[:120])[0][1::2])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.999), (0.0, 0.9), (0.99, 0.999)])
def test_the_bound_on_a_step_is_that_of_exact_adamw_and_is_reached(betas):
    beta1, beta2 = betas
    p = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=1.0, betas=betas, eps=1e-30, weight_decay=0.0)
    steps = 3000
    for step in range(1, steps + 1):  # the gradients for which Cauchy and Schwarz's inequality is an equality
        p.grad = torch.tensor([(beta1 / beta2) ** min(steps - step, 1500)], dtype=torch.float64)
        before = p.item()
        optimizer.step()
    correction = (1 - beta2**steps) ** 0.5 / (1 - beta1**steps)
    assert before - p.item() == pytest.approx(correction / smallest_root(*betas), rel=1e-3)


def test_without_a_bound_there_is_none_to_restore():
    assert smallest_root(0.9, 0.81) == smallest_root(0.9, 0.5) == smallest_root(0.9, 0.0) == 0
    assert smallest_root(0.0, 0.0) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("size", [8192, 8192 + 100])
def test_a_bad_gradient_costs_one_weight_and_not_its_block(bad, size):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for _ in range(4)]
    where = size - 50
    without = [g.clone() for g in gradients]
    gradients[1][where], without[1][where] = bad, 0.0
    (hit, _), (clean, _) = moved(ours, gradients), moved(ours, without)
    others = torch.arange(size) != where
    assert hit.isfinite()[others].all() and hit[where].isfinite() == (bad == 1e30)
    assert (hit - clean)[others].abs().max() < 1e-5, (
        "scales of a block without its largest number differ a little"
    )


def test_blocks_of_zeros_stay_where_they_are_and_start_as_with_exact_moments():
    gradients = [torch.zeros(8192 + 30) for _ in range(4)]
    for gradient in gradients:
        gradient[300:400] = 1.0
    gradients[3][2000:2010] = gradients[3][-3:] = 1e-6
    (mine, _), (theirs, _) = moved(ours, gradients), moved(torch_adamw, gradients)
    assert torch.allclose(mine, theirs, atol=1e-6) and mine[2000] != 0 and mine[-1] != 0
    assert (mine[(theirs == 0)] == 0).all()


def test_the_readable_path_and_the_kernels_round_alike():
    gradients = [*like_an_embeddings(4, 8, seed=0), *one_row_in_two(6, at=2)]
    for same_shape in (gradients[:4], gradients[4:]):
        results = []
        for fast in (True, False):
            set_fast(fast)
            try:
                results.append(moved(ours, same_shape)[0])
            finally:
                set_fast(True)
        assert torch.equal(*results)


def test_a_state_of_an_earlier_version_loads_and_steps_within_the_bound():
    """Its second moments are zero under first moments that are not."""
    m, v = torch.full((8192,), 1e-5), torch.full((8192,), 1e-11)
    m[::2], v[::2] = 0.1, 1e-3
    state = {"step": torch.tensor(1.0)}
    for name, moment in (("exp_avg", m), ("exp_avg_sq", v)):
        state[name], state[f"{name}_absmax"] = quantize_moment(moment, MAPS[name])
    assert (state["exp_avg_sq"][1::2] == 0).all()
    p = Parameter(torch.zeros(8192))
    optimizer = ours([p])
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    first, second = optimizer.moments(p)
    assert (first.abs() * smallest_root(0.9, 0.999) <= second.sqrt() * (1 + 1e-6)).all()
    p.grad = torch.zeros(8192)
    optimizer.step()
    assert p.abs().max() <= LR / smallest_root(0.9, 0.999)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_move_no_farther(dtype):
    gradients = list(like_an_embeddings(40, 3, seed=1))
    _, longest = moved(ours, gradients, dtype)
    assert longest <= 1.05 * LR * 7.3


def test_codes_are_the_nearest_but_where_the_docstring_says():
    generator = torch.Generator().manual_seed(0)
    m, g = (torch.randn(5000, generator=generator) for _ in range(2))
    v = torch.randn(5000, generator=generator).square()
    v[::7], g[::11] = 0.0, 0.0
    nearest = [quantize_moment(value, levels) for value, levels in zip((m, v), MAPS.values(), strict=True)]
    for (codes, absmax), (plain, scales), other in zip(
        quantize_moments(m, v, g), nearest, (g == 0, v > 0), strict=True
    ):
        assert torch.equal(absmax, scales) and torch.equal(codes[~other], plain[~other])
    lowest = (nearest[1][0] == 0) & (v > 0)
    assert lowest.any() and (quantize_moments(m, v, g)[1][0][lowest] == 1).all()
