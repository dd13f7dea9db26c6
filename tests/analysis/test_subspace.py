"""A random subspace of all weights: orthonormal, exact at full dimension, and removable."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from labkit.analysis.subspace import add_subspace, matching_lr, remove_subspace
from labkit.analysis.updates import find_updates
from tests.analysis.matrices import gaussian

IDS = torch.arange(40).view(2, 20)


def two_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def columns(model, d):
    """P, (D, d): what each coordinate alone adds to all weights."""
    z = next(p for p in model.parameters() if p.requires_grad)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def flat():
        return torch.cat([layer.weight.detach().flatten() for layer in layers])

    start, found = flat(), []
    for i in range(d):
        z.data.zero_()
        z.data[i] = 1
        found.append(flat() - start)
    z.data.zero_()
    return torch.stack(found, dim=1)


def test_a_model_in_a_subspace_starts_as_the_base_and_trains_only_z(small_llama):
    with torch.no_grad():
        before = small_llama(IDS).logits
        add_subspace(small_llama, 50, seed=0)
        assert torch.equal(small_llama(IDS).logits, before)
    trainable = [p for p in small_llama.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trainable] == [(50,)]


@pytest.mark.parametrize("d", [1, 7, 50, 99, 100])
def test_directions_are_orthonormal_and_each_weight_follows_one(d):
    P = columns(add_subspace(two_layers(), d, seed=3), d)
    touched = (P != 0).sum(0)
    assert touched.max() - touched.min() <= 1 and ((P != 0).sum(1) == 1).all()
    # D / d weights a direction, or one more or less: lengths within sqrt of that
    assert torch.allclose(P.T @ P, torch.diag(touched * d / 100), atol=1e-4)


def test_with_as_many_directions_as_weights_the_gradient_is_the_full_one():
    x = gaussian(20, 6)
    full, moved = two_layers(), add_subspace(two_layers(), 100, seed=3)
    full(x).square().sum().backward()
    gradient = torch.cat([m.weight.grad.flatten() for m in full if isinstance(m, nn.Linear)])
    moved(x).square().sum().backward()
    z = next(p for p in moved.parameters() if p.requires_grad)
    assert torch.allclose(columns(moved, 100) @ z.grad, gradient, atol=1e-4)


def test_the_gradient_of_z_is_the_projected_one_and_keeps_d_of_D_of_its_energy():
    x, kept = gaussian(20, 6), []
    full = two_layers()
    full(x).square().sum().backward()
    gradient = torch.cat([m.weight.grad.flatten() for m in full if isinstance(m, nn.Linear)])
    for seed in range(150):
        moved = add_subspace(two_layers(), 20, seed)
        moved(x).square().sum().backward()
        z = next(p for p in moved.parameters() if p.requires_grad)
        if seed < 3:
            assert torch.allclose(z.grad, columns(moved, 20).T @ gradient, atol=1e-4)
        kept.append((z.grad.norm() ** 2 / gradient.norm() ** 2).item())
    assert np.mean(kept) == pytest.approx(20 / 100, rel=0.1)


def test_matching_lr_moves_each_weight_as_far_as_full_fine_tuning_would():
    model = add_subspace(two_layers(), 20, seed=0)
    z = next(p for p in model.parameters() if p.requires_grad)
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.Adam([z], lr=matching_lr(model, 0.01))
    model(gaussian(20, 6)).square().sum().backward()
    optimizer.step()
    assert torch.allclose((model[0].weight - before).abs(), torch.full((10, 6), 0.01), atol=1e-4)


def test_removing_the_subspace_leaves_plain_weights_with_the_change(small_llama):
    base = copy.deepcopy(small_llama)
    add_subspace(small_llama, 30, seed=0)
    z = next(p for p in small_llama.parameters() if p.requires_grad)
    z.data.normal_(generator=torch.Generator().manual_seed(0))
    change = find_updates(base, small_llama)
    with torch.no_grad():
        logits = small_llama(IDS).logits
        remove_subspace(small_llama)
        assert torch.equal(small_llama(IDS).logits, logits)
    assert set(small_llama.state_dict()) == set(base.state_dict())
    moved = torch.stack([c.norm() for c in change.values()]).norm()
    assert moved == pytest.approx(z.norm().item(), rel=1e-3), "|P z| = |z|"


def test_a_subspace_of_the_same_seed_is_the_same_and_of_another_is_not():
    first, again, other = (columns(add_subspace(two_layers(), 9, seed), 9) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_subspaces_that_cannot_be_are_refused_and_change_nothing():
    model = two_layers()
    for d in (0, 101, 2.5, True):
        with pytest.raises(ValueError, match="from 1 to 100"):
            add_subspace(model, d, seed=0)
    assert all(p.requires_grad for p in model.parameters())
    for call in (remove_subspace, lambda m: matching_lr(m, 0.1)):
        with pytest.raises(ValueError, match="in no subspace"):
            call(model)
    add_subspace(model, 5, seed=0)
    with pytest.raises(ValueError, match="already"):
        add_subspace(model, 5, seed=0)
    with pytest.raises(ValueError, match="no linear layer"):
        add_subspace(nn.Sequential(nn.Tanh()), 5, seed=0)
