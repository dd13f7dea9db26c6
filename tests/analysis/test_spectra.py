"""Singular values, ranks, subspaces, controls: against numpy and closed forms, with planted answers."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.analysis import spectra
from labkit.analysis.updates import Factored, find_updates, linear_layers
from tests.analysis.matrices import gaussian, orthonormal, with_spectrum

IDS = torch.arange(40).view(2, 20)
SIZES = st.integers(1, 24)


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(0, 99))
def test_singular_values_and_vectors_equal_numpys(m, n, seed):
    matrix = gaussian(m, n, seed)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    U, s, Vh = spectra.svd(matrix)
    assert np.allclose(s, expected, atol=1e-5) and np.allclose(
        spectra.singular_values(matrix), expected, atol=1e-5
    )
    assert torch.allclose(U @ torch.diag(s) @ Vh, matrix, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(1, 30), st.integers(0, 99))
def test_factored_svd_equals_numpys_of_the_product_also_where_r_is_above_a_side(m, n, r, seed):
    left, right = gaussian(m, r, seed), gaussian(r, n, seed + 1)
    product = (left.double() @ right.double()).numpy()
    found = spectra.svd(Factored(left, right))
    expected = np.linalg.svd(product, compute_uv=False)
    short = min(len(found.s), len(expected))
    assert np.allclose(found.s[:short], expected[:short], atol=1e-4)
    assert np.allclose(expected[short:], 0, atol=1e-4), "what is left out must be zero"
    assert np.allclose((found.U * found.s) @ found.Vh, product, atol=1e-4)
    for basis in (found.U, found.Vh.T):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4)


def test_a_factored_matrix_is_never_multiplied_out(monkeypatch):
    monkeypatch.setattr(Factored, "dense", lambda self: pytest.fail("the product was formed"))
    huge = Factored(gaussian(200_000, 2), gaussian(2, 200_000))  # the product would take 160 GB
    assert spectra.effective_rank(spectra.singular_values(huge)) == pytest.approx(2, abs=0.1)


def test_ranks_of_n_equal_singular_values_are_n():
    s = torch.full((7,), 3.0)
    assert spectra.effective_rank(s) == pytest.approx(7) and spectra.stable_rank(s) == pytest.approx(7)
    assert [spectra.energy_rank(s, share) for share in (0.01, 1 / 7, 0.5, 0.9, 1)] == [1, 1, 4, 7, 7]


def test_ranks_of_a_known_spectrum_equal_the_closed_forms():
    s = torch.tensor([4.0, 2.0, 1.0, 1.0])  # p = 1/2, 1/4, 1/8, 1/8: entropy 7/4 ln 2
    assert spectra.effective_rank(s) == pytest.approx(2**1.75)
    assert spectra.stable_rank(s) == pytest.approx(22 / 16)
    assert spectra.energy_rank(s) == 2 and spectra.energy_rank(s, 16 / 22) == 1  # 20/22 = 0.909
    assert spectra.energy_rank(s.flip(0)) == 2, "the order of s must not matter"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_ranks_lie_between_1_and_n_and_do_not_depend_on_the_size_of_the_matrix(values, factor):
    s = torch.tensor(values, dtype=torch.float64)
    for rank in (spectra.effective_rank, spectra.stable_rank, spectra.energy_rank):
        assert 1 - 1e-9 <= rank(s) <= len(values) + 1e-9
        assert rank(s * factor) == pytest.approx(rank(s))
    zeros = torch.cat([s, torch.zeros(3, dtype=torch.float64)])
    assert spectra.effective_rank(zeros) == pytest.approx(spectra.effective_rank(s))


def test_truncation_is_the_best_of_its_rank_and_its_error_is_the_tail_of_the_spectrum():
    matrix = gaussian(30, 20)
    s = spectra.singular_values(matrix)
    for k in (0, 1, 5, 19, 20, 50):
        cut = spectra.truncate(matrix, k)
        assert (matrix - cut).norm() == pytest.approx(s[k:].norm().item(), abs=1e-4)  # Eckart-Young
        assert torch.linalg.matrix_rank(cut) == min(k, 20)
        assert torch.allclose(spectra.truncate(spectra.svd(matrix), k), cut)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_random_directions_keep_k_of_n_of_the_energy_and_have_rank_k(shape):
    matrix = gaussian(*shape)
    kept = [
        spectra.random_directions(matrix, 5, seed).norm() ** 2 / matrix.norm() ** 2 for seed in range(200)
    ]
    assert np.mean(kept) == pytest.approx(5 / 25, rel=0.05)
    assert torch.linalg.matrix_rank(spectra.random_directions(matrix, 5, 0)) == 5
    assert torch.allclose(spectra.random_directions(matrix, 99, 0), matrix, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_randomized_svd_is_exact_on_low_rank_and_says_so(shape):
    matrix = with_spectrum(*shape, [9.0, 5, 3, 1])
    (U, s, Vh), bound = spectra.randomized_svd(matrix, 4)
    assert bound < 1e-4
    assert torch.allclose(s, torch.tensor([9.0, 5, 3, 1]), atol=1e-4)
    assert torch.allclose((U * s) @ Vh, matrix, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.floats(0, 2), st.integers(0, 99))
def test_true_singular_values_lie_in_the_interval_that_the_bound_gives(k, oversample, powers, decay, seed):
    s = torch.arange(1, 41) ** -decay
    matrix = with_spectrum(60, 40, s, seed)
    found, bound = spectra.randomized_svd(matrix, k, oversample, powers, seed)
    true = torch.from_numpy(np.linalg.svd(matrix.double().numpy(), compute_uv=False))[:k]
    assert (found.s <= true + 1e-5).all() and (true <= (found.s**2 + bound**2).sqrt() + 1e-5).all()


def test_bound_is_small_on_a_falling_spectrum_and_large_on_noise():
    falling = with_spectrum(400, 300, 2.0 ** -torch.arange(60))
    (_, s, _), bound = spectra.randomized_svd(falling, 10)
    assert bound < 1e-4 * s[0]
    (_, s, _), bound = spectra.randomized_svd(gaussian(400, 300), 10)
    assert bound > s[0], "noise has no low rank, and the bound must say so"


def test_similarity_of_a_basis_with_itself_is_1_and_with_an_orthogonal_one_0():
    basis = orthonormal(50, 12)
    assert spectra.subspace_similarity(basis[:, :6], basis[:, 6:]).abs().max() < 1e-6
    same = spectra.subspace_similarity(basis, basis)
    assert torch.allclose(same, torch.ones(12, 12), atol=1e-5), (
        "one span contains the other: phi is 1 for all i, j"
    )


def test_similarity_equals_the_formula_of_the_paper():
    first, second = orthonormal(40, 5), orthonormal(40, 9, seed=3)
    phi = spectra.subspace_similarity(first, second)
    for i in (1, 3, 5):
        for j in (1, 5, 9):
            expected = np.linalg.norm(first[:, :i].T.numpy() @ second[:, :j].numpy()) ** 2 / min(i, j)
            assert phi[i - 1, j - 1] == pytest.approx(expected, abs=1e-5)


def test_similarity_depends_on_the_span_and_not_on_its_basis():
    first, second = orthonormal(40, 5), orthonormal(40, 5, seed=3)
    turned = first @ orthonormal(5, 5, seed=7)
    assert spectra.subspace_similarity(first, second)[4, 4] == pytest.approx(
        spectra.subspace_similarity(turned, second)[4, 4].item(), abs=1e-5
    )


def test_random_subspaces_are_as_similar_as_chance_says():
    phis = [
        spectra.subspace_similarity(orthonormal(60, 4, 2 * n), orthonormal(60, 10, 2 * n + 1))
        for n in range(300)
    ]
    mean = torch.stack(phis).mean(0)
    for i, j in [(1, 1), (4, 10), (2, 8)]:
        assert mean[i - 1, j - 1] == pytest.approx(max(i, j) / 60, rel=0.2)


def test_similarity_refuses_what_is_no_orthonormal_basis():
    with pytest.raises(ValueError, match="columns of second are not orthonormal"):
        spectra.subspace_similarity(orthonormal(20, 3), gaussian(20, 3))
    with pytest.raises(ValueError, match="20 and of 30 numbers"):
        spectra.subspace_similarity(orthonormal(20, 3), orthonormal(30, 3))


def test_amplification_of_a_planted_update_is_its_factor():
    weight = with_spectrum(30, 20, [8.0, 4, 2, 1])
    U, s, Vh = spectra.svd(weight)
    update = 21.5 * s[2] * U[:, 2:3] @ Vh[2:3]  # turns up the third direction, 21.5 times
    assert spectra.amplification(update, weight, 1) == pytest.approx(21.5, rel=1e-3)
    assert spectra.amplification(3 * weight, weight, 4) == pytest.approx(3, rel=1e-3)


def test_planted_intruders_are_found_and_only_they():
    weight = with_spectrum(40, 60, torch.linspace(10, 1, 40))
    assert spectra.intruder_dimensions(weight, weight) == []
    assert spectra.intruder_dimensions(weight, 1.7 * weight) == []
    # a direction that is spread evenly over all of the base's, and larger than all of them
    spread = spectra.svd(weight).U.mean(dim=1) * math.sqrt(40)
    planted = weight + 30 * spread[:, None] @ orthonormal(60, 1, seed=9).T
    assert spectra.intruder_dimensions(weight, planted) == [0]
    assert spectra.intruder_dimensions(weight, planted, epsilon=0.01) == []


def test_gaussian_control_has_shape_and_norm_and_depends_on_the_seed_alone():
    matrix = gaussian(30, 50) * 7
    first, again, other = (spectra.gaussian_like(matrix, seed) for seed in (1, 1, 2))
    assert first.shape == matrix.shape and first.norm() == pytest.approx(matrix.norm().item(), rel=1e-5)
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("shape", [(400, 400), (600, 150), (150, 600)])
def test_marchenko_pastur_edge_is_where_the_spectrum_of_noise_ends(shape):
    top = spectra.singular_values(0.3 * gaussian(*shape))[0].item()
    assert top == pytest.approx(spectra.mp_edge(*shape, std=0.3), rel=0.03)


@pytest.mark.parametrize("function", [spectra.svd, spectra.singular_values, lambda m: spectra.truncate(m, 2)])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.randn(5), r"two dimensions .* not shape \(5,\)"),
        (torch.randn(0, 5), r"at least one element .* \(0, 5\)"),
        (torch.tensor([[1.0, math.nan], [2, 3]]), "1 values that are NaN"),
        (torch.tensor([[1.0, math.inf], [2, math.inf]]), "2 values that are NaN or infinite"),
    ],
)
def test_matrices_that_are_none_are_refused(function, matrix, message):
    with pytest.raises(ValueError, match=message):
        function(matrix)


@pytest.mark.parametrize("rank", [spectra.effective_rank, spectra.stable_rank, spectra.energy_rank])
def test_a_rank_of_nothing_is_refused(rank):
    with pytest.raises(ValueError, match="all singular values are zero"):
        rank(spectra.singular_values(torch.zeros(4, 3)))
    with pytest.raises(ValueError, match="call singular_values"):
        rank(torch.ones(4, 3))
    with pytest.raises(ValueError, match="call singular_values"):
        rank(torch.tensor([1.0, -1.0]))


def test_arguments_out_of_range_are_refused():
    matrix = gaussian(6, 4)
    for call, message in [
        (lambda: spectra.truncate(matrix, -1), "k=-1"),
        (lambda: spectra.randomized_svd(matrix, 5), "choose 1 to 4"),
        (lambda: spectra.energy_rank(torch.ones(3), 1.5), "at most 1"),
        (lambda: spectra.amplification(matrix, matrix, 0), "r=0"),
        (lambda: spectra.intruder_dimensions(matrix, matrix, epsilon=2), "epsilon=2"),
        (lambda: spectra.intruder_dimensions(matrix, matrix.T), "6 and 4 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_truncated_update_of_full_rank_is_the_tuned_model_and_the_base_comes_back_bit_for_bit(small_llama):
    tuned = copy.deepcopy(small_llama)
    for n, layer in enumerate(linear_layers(tuned).values()):
        layer.weight.data += 0.02 * gaussian(*layer.weight.shape, seed=n)
    found = {name: spectra.svd(update) for name, update in find_updates(small_llama, tuned).items()}
    state = copy.deepcopy(small_llama.state_dict())
    with torch.no_grad():
        base, goal = small_llama(IDS).logits, tuned(IDS).logits
        with spectra.with_truncated_update(small_llama, found, 999) as model:
            assert torch.allclose(model(IDS).logits, goal, atol=1e-4) and not torch.allclose(
                goal, base, atol=1e-2
            )
        with spectra.with_truncated_update(small_llama, found, 1):
            weight = small_llama.model.layers[0].self_attn.q_proj.weight
            change = weight - state["model.layers.0.self_attn.q_proj.weight"]
            assert spectra.stable_rank(spectra.singular_values(change)) == pytest.approx(1, abs=1e-3)
        with pytest.raises(KeyboardInterrupt), spectra.with_truncated_update(small_llama, found, 3):
            raise KeyboardInterrupt
        assert torch.equal(small_llama(IDS).logits, base)
    assert all(torch.equal(state[k], v) for k, v in small_llama.state_dict().items())
