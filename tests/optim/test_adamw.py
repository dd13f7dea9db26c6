"""AdamW against torch.optim's, bit for bit; 8-bit AdamW against bitsandbytes', and within its tolerances."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.hardware import set_fast
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.moments import MAPS, quantize_moment
from labkit.quant.blockwise import quantize_blocks
from labkit.quant.codebooks import midpoints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def parameters(shapes, dtype=torch.float32, seed=0):
    """Some contiguous, some not."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(p.t() if n % 2 and p.dim() == 2 else p) for n, p in enumerate(made)]


def train_alike(pairs, optimizers, steps, seed=1, scale=1.0):
    """The same random gradients to both of each pair; one parameter in five goes without one."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for n, (a, b) in enumerate(pairs):
            a.grad = b.grad = None
            if (step + n) % 5:
                a.grad = (scale * torch.randn(a.shape, generator=generator)).to(a.dtype)
                b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_bit_for_bit_over_60_steps(dtype, weight_decay):
    shapes = [(37, 53), (64, 30), (100,), (1,), (3, 5, 7)]
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    a = AdamW(mine, lr=1e-2, weight_decay=weight_decay)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=weight_decay, foreach=False, fused=False)
    train_alike(list(zip(mine, theirs)), (a, b), 60)
    for p, q in zip(mine, theirs):
        assert torch.equal(p, q)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a.state[p][key], b.state[q][key]), key
            assert a.state[p][key].dtype == b.state[q][key].dtype


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.floats(1e-6, 1.0),
    st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    st.floats(1e-12, 1e-2),
    st.floats(0, 0.5),
    st.floats(1e-6, 1e4),
)
def test_adamw_equals_torch_for_any_settings(shape, lr, betas, eps, weight_decay, scale):
    mine, theirs = parameters([shape]), parameters([shape])
    same = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    optimizers = AdamW(mine, **same), torch.optim.AdamW(theirs, **same, foreach=False, fused=False)
    train_alike(list(zip(mine, theirs)), optimizers, 5, scale=scale)
    assert torch.equal(mine[0], theirs[0])


def test_groups_with_settings_of_their_own_and_changes_of_them_are_those_of_torch():
    mine, theirs = parameters([(20, 30), (50,)]), parameters([(20, 30), (50,)])
    groups = lambda p: [{"params": p[:1], "weight_decay": 0.0}, {"params": p[1:], "lr": 1e-4}]  # noqa: E731
    a, b = AdamW(groups(mine), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2, foreach=False)
    for lr in (1e-2, 3e-3):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = lr
        train_alike(list(zip(mine, theirs)), (a, b), 10)
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs))


def test_a_state_dict_goes_to_torch_and_back_in_the_middle_of_a_run():
    mine, theirs = parameters([(20, 30)]), parameters([(20, 30)])
    a, b = AdamW(mine, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, foreach=False, weight_decay=0.01)
    train_alike(list(zip(mine, theirs)), (a, b), 10)
    a2, b2 = AdamW(mine), torch.optim.AdamW(theirs, foreach=False)
    a2.load_state_dict(b.state_dict())
    b2.load_state_dict(a.state_dict())
    train_alike(list(zip(mine, theirs)), (a2, b2), 10, seed=2)
    assert torch.equal(mine[0], theirs[0])


def test_a_closure_is_called_once_with_gradients_and_its_loss_returned():
    weight = torch.nn.Parameter(torch.ones(3))
    calls = []

    def closure():
        loss = (weight**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert AdamW([weight]).step(closure).item() == 3.0 and calls == [3.0]


def test_moments_in_float16_are_warned_about_because_the_weight_becomes_infinite_as_in_torch():
    def stepped(make):
        p = torch.nn.Parameter(torch.zeros(5000, dtype=torch.float16))
        p.grad = torch.full_like(p, 1e-3)
        make([p]).step()
        return p.detach()

    with pytest.warns(UserWarning, match=r"moments of a float16 parameter .* becomes infinite.* AdamW8bit"):
        mine = stepped(AdamW)
    assert torch.equal(mine, stepped(lambda p: torch.optim.AdamW(p, foreach=False))) and mine.isinf().all()
    assert stepped(AdamW8bit).isfinite().all()


# --- 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 256), (1024, 33), (4097,)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_from_the_same_8_bit_state_the_update_is_that_of_bitsandbytes_bit_for_bit(dtype, shape, weight_decay):
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    mine = torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype))
    theirs = torch.nn.Parameter(mine.detach().clone())
    a = AdamW8bit([mine], lr=1e-3, weight_decay=weight_decay)
    b = bnb.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=weight_decay)
    for _ in range(6):
        mine.grad = (0.01 * torch.randn(shape, generator=generator)).to(dtype)
        theirs.grad = mine.grad.clone()
        a.step()
        b.step()
        assert torch.equal(mine, theirs)
        state, other = a.state[mine], b.state[theirs]
        for name, n in (("exp_avg", 1), ("exp_avg_sq", 2)):
            assert torch.equal(state[f"{name}_absmax"], other[f"absmax{n}"]), "the scales are the same"
            assert torch.equal(MAPS[name], other[f"qmap{n}"]), "and the maps"
            # codes: ours are the nearest; on a CPU bitsandbytes takes the nearest to the centre of one of
            # 65,536 bins over [-1, 1], so that its level is off by up to a bin and a gap between levels
            mine_, other_ = (MAPS[name][codes.view(-1).int()] for codes in (state[name], other[f"state{n}"]))
            gaps = MAPS[name].diff()
            gap = torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))[state[name].int()]
            assert ((mine_ - other_).abs() <= gap + 2.01 / 65535).all()
            assert (mine_ != other_).float().mean() < 0.05, "it shows at tiny values only"
            other[f"state{n}"].copy_(state[name].view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 257])
def test_adamw8bit_stays_within_the_tolerances_of_bitsandbytes_own_test(dtype, width):
    """As bitsandbytes' test_optimizer8bit: 50 steps beside 32-bit Adam, which gets the state after each."""
    generator = torch.Generator().manual_seed(0)
    p2 = torch.nn.Parameter((0.1 * torch.randn(1024, width, generator=generator)).to(dtype))
    p1 = torch.nn.Parameter(p2.detach().float())
    reference, eight = (
        torch.optim.AdamW([p1], lr=1e-3, weight_decay=0.0, foreach=False),
        AdamW8bit([p2], lr=1e-3, weight_decay=0.0),
    )
    for _ in range(50):
        gradient = (0.01 * torch.randn(1024, width, generator=generator)).to(dtype)
        p1.grad, p2.grad = gradient.float(), gradient
        reference.step()
        eight.step()
        for name, moment in zip(MAPS, eight.moments(p2)):
            far = ~torch.isclose(reference.state[p1][name], moment, atol=3e-3, rtol=1e-3)
            assert far.sum() < 20
            reference.state[p1][name].copy_(moment)
        error = (p1 - p2.float()).abs()
        relative = error / (p1.abs() + 1e-9)
        bf16 = dtype == torch.bfloat16
        assert error.mean() < (0.00017 if bf16 else 0.00006) and relative.mean() < (
            0.0016 if bf16 else 0.0006
        )
        with torch.no_grad():
            p1.copy_(p1.to(dtype))
            p2.copy_(p1)


@given(st.integers(1, 3000), st.integers(-30, 10), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_moment_goes_to_the_nearest_level_fast_or_readable(n, exponent, signed):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 2.0**exponent
    levels = MAPS["exp_avg" if signed else "exp_avg_sq"]
    values = values if signed else values.square()
    codes, absmax = quantize_moment(values, levels)
    expected = quantize_blocks(values, levels, 256)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])
    scaled = (values / absmax.repeat_interleave(256)[:n]).double()
    gaps = (levels.double()[:, None] - scaled).abs()
    assert torch.allclose(gaps.amin(0), gaps[codes.long(), torch.arange(n)], atol=2e-7)
    assert len(midpoints(levels)) == 255


def test_the_readable_path_and_the_kernels_train_to_the_same_bits():
    results = []
    for fast in (True, False):
        set_fast(fast)
        try:
            p = parameters([(70, 100)])[0]
            q = parameters([(70, 100)])[0]
            optimizers = AdamW8bit([p], lr=1e-2), AdamW8bit([q], lr=1e-2)
            train_alike([(p, q)], optimizers, 6)
        finally:
            set_fast(True)
        results.append(p.detach())
    assert torch.equal(*results)


def test_eight_bits_cost_2_03_bytes_a_number_and_small_tensors_stay_in_fp32():
    large, small = torch.nn.Parameter(torch.zeros(256, 256)), torch.nn.Parameter(torch.zeros(4095))
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    optimizer = AdamW8bit([large, small])
    optimizer.step()
    nbytes = {p: sum(v.nbytes for v in optimizer.state[p].values()) for p in (large, small)}
    assert nbytes[large] == 2 * 65536 + 2 * 4 * 256 + 4 and nbytes[small] == 8 * 4095 + 4
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_8_bit_state_dict_survives_torch_casting_it_to_the_dtype_of_the_parameter(dtype):
    shapes = [(80, 90), (10,)]
    mine, twin = parameters(shapes, dtype), parameters(shapes, dtype)
    a, b = AdamW8bit(mine, lr=1e-2), AdamW8bit(twin, lr=1e-2)
    train_alike(list(zip(mine, twin)), (a, b), 7)
    resumed = AdamW8bit(twin, lr=1e-2)
    resumed.load_state_dict(b.state_dict())
    train_alike(list(zip(mine, twin)), (a, resumed), 7, seed=3)
    for p, q in zip(mine, twin):
        assert torch.equal(p, q)
        for key in a.state[p]:
            assert torch.equal(a.state[p][key], resumed.state[q][key])
            assert a.state[p][key].dtype == resumed.state[q][key].dtype


def test_pieces_make_no_difference(monkeypatch):
    p, q = parameters([(100, 83)])[0], parameters([(100, 83)])[0]
    a, b = AdamW8bit([p]), AdamW8bit([q])
    train_alike([(p, q)], (a,), 4)
    monkeypatch.setattr("labkit.optim.adamw.PIECE", 512)
    train_alike([(p, q)], (b,), 4)
    assert torch.equal(p, q)


def test_a_nan_gradient_shows_in_the_weights_instead_of_being_quantized_away():
    p = torch.nn.Parameter(torch.zeros(80, 80))
    p.grad = torch.zeros_like(p)
    p.grad[3, 3] = torch.nan
    optimizer = AdamW8bit([p])
    optimizer.step()
    assert p[3, 3].isnan()
    p.grad.zero_()
    optimizer.step()
    assert p[3, 3].isnan()


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_bad_settings_and_gradients_are_refused_with_what_is_allowed(kind):
    weight = torch.nn.Parameter(torch.zeros(5000, 2))
    for settings_, message in (
        ({"lr": -1}, "lr=-1"),
        ({"eps": float("nan")}, "eps"),
        ({"betas": (0.9, 1.0)}, "up to, not including, 1"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ):
        with pytest.raises(ValueError, match=message):
            kind([weight], **settings_)
    with pytest.raises(ValueError, match="whole number"):
        AdamW8bit([weight], min_8bit_size=1.5)
    weight.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], weight.shape)
    with pytest.raises(ValueError, match="sparse gradient"):
        kind([weight]).step()
