"""The furniture of `03_is_the_update_low_rank`: checks that name mistakes, and its explorer in both of its
forms.
"""

import math

import pytest
import torch

from labkit.analysis import spectra
from labkit.lab.check import spectra as check
from labkit.lab.explore import spectra as explore
from tests.lab import exercise_checks, explorers


def entropy(p):
    return torch.special.entr(p).sum()


def cut(matrix, keep, power=1):
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, keep] * s[keep] ** power) @ Vh[keep]


def first_columns(matrix, k):
    return torch.cat([matrix[:, :k], torch.zeros_like(matrix[:, k:])], dim=1)


def through_qr(B, A, scaling):
    return scaling * torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)


def norm2(a, b):
    return torch.linalg.norm(a.T @ b) ** 2


def by_rows_of_V(matrix, k, wrong):
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :k] * s[:k]) @ wrong(Vh)


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.effective_rank,
        lambda s: spectra.effective_rank(s),
        [
            (lambda s: entropy(s**2 / (s**2).sum()).exp(), "not of their squares"),
            (lambda s: entropy(s / s.sum()), "exp of it"),
            (lambda s: math.exp(entropy(s / s.sum()) / math.log(2)), "in bits"),
            (lambda s: spectra.stable_rank(s), "stable rank"),
            (lambda s: (-(s / s.sum() * (s / s.sum()).log()).sum()).exp(), "became NaN"),
            (lambda s: entropy(s / s.max()).exp(), "divided by the largest"),
            (lambda s: entropy(s).exp(), "divide by their sum first"),
            (lambda s: 1 / entropy(s / s.sum()).exp(), "the sign"),
            (lambda s: torch.count_nonzero(s), "their sizes matter"),
        ],
    )
    yield (
        check.keep_largest,
        spectra.truncate,
        [
            (lambda m, k: cut(m, slice(min(m.shape) - k, None)), "k \\*smallest\\*"),
            (lambda m, k: m - cut(m, slice(0, k)), "removes the k largest"),
            (lambda m, k: cut(m, slice(0, k + 1)), "k \\+ 1"),
            (lambda m, k: by_rows_of_V(m, k, lambda Vh: Vh[:, :k].T), "without a transpose"),
            (lambda m, k: by_rows_of_V(m, k, lambda Vh: Vh[:, :k]), "as it is"),
            (lambda m, k: by_rows_of_V(m, k, lambda Vh: Vh[:k].T), "as it is"),
            (lambda m, k: cut(m, slice(0, k - 1)), "too few"),
            (lambda m, k: cut(m, slice(0, k), 0), "singular values are missing"),
            (lambda m, k: cut(m, slice(0, k), 2), "in twice"),
            (first_columns, "first k columns"),
            (lambda m, k: m.clone(), "nothing was left out"),
        ],
    )
    yield (
        check.similarity,
        lambda a, b: spectra.subspace_similarity(a, b)[-1, -1],
        [
            (lambda a, b: norm2(a, b) / max(a.shape[1], b.shape[1]), "not max"),
            (norm2, "between 0 and 1"),
            (lambda a, b: norm2(a, b) ** 0.5 / min(a.shape[1], b.shape[1]), "should be squared"),
            (lambda a, b: norm2(a, b) / min(a.shape[1], b.shape[1]) ** 0.5, "not by its root"),
            (lambda a, b: (a.T @ b).square().mean(), "mean of the squared cosines"),
            (lambda a, b: norm2(a, b) / a.shape[0], "length d"),
            (lambda a, b: (a.T @ b).abs().max(), "largest cosine"),
        ],
    )
    yield (
        check.factored_singular_values,
        through_qr,
        [
            (lambda B, A, c: through_qr(B, A, 1), "scaling is missing"),
            (lambda B, A, c: torch.linalg.svdvals(c * B @ A), "zeros at the end"),
            (lambda B, A, c: c * torch.linalg.svdvals(B) * torch.linalg.svdvals(A), "not the products"),
            (
                lambda B, A, c: torch.linalg.svdvals(c * torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1]),
                "must be transposed",
            ),
            (lambda B, A, c: through_qr(B, A, c) ** 2, "squares"),
            (lambda B, A, c: through_qr(B, A, c * c), "counts once"),
            (lambda B, A, c: through_qr(B, A, c).sort().values, "must fall"),
            (lambda B, A, c: torch.linalg.svdvals(c * B), "B alone"),
        ],
    )
    yield (
        check.count_intruders,
        lambda b, a, e: sum(bool(((b.T @ column).abs() < e).all()) for column in a.T),
        [
            (lambda b, a, e: ((b.T @ a).max(dim=0).values < e).sum(), "absolute value"),
            (lambda b, a, e: ((b.T @ a).diagonal().abs() < e).sum(), "same number"),
            (lambda b, a, e: ((b.T @ a).abs().min(dim=0).values < e).sum(), "looks at the smallest"),
            (lambda b, a, e: ((b.T @ a).abs() >= e).any(dim=0).sum(), "\\*not\\* intruders"),
            (lambda b, a, e: ((b.T @ a).abs() < e).all(dim=1).sum(), "of the base that were lost"),
            (lambda b, a, e: ((b.T @ a).abs() < e).sum(), "counts pairs"),
            (lambda b, a, e: ((b.T @ a).abs() < e).all(dim=0), "how many"),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The explorer


@pytest.fixture(scope="module")
def updates():
    torch.manual_seed(0)
    full = {f"model.layers.{i}.mlp.up_proj": torch.randn(30, 20) for i in range(2)}
    lora = {name: spectra.Factored(torch.randn(30, 4), torch.randn(4, 20)) for name in full}
    return {"full fine-tuning": full, "LoRA r=4": lora}


KNOWN = {"full fine-tuning": {0: 0.0, 4: 0.5}}


@pytest.fixture(scope="module")
def explorer(updates):
    return explorers.Explorer(
        explore, lambda: explore.update_explorer(updates, lambda method, k: 0.375, KNOWN)
    )


def test_headless_the_explorer_measures_what_it_shows_for_first_and_last_method(updates):
    measured = []

    def share_kept(method, k):
        measured.append((method, k))
        return 0.375

    figures = explorers.shown(explore, lambda: explore.update_explorer(updates, share_kept, KNOWN))
    assert measured == [("full fine-tuning", 8), ("LoRA r=4", 2)] and len(figures) == 2
    assert all("38% of the improvement" in explorers.title(figure, axes=1) for figure in figures)


def test_the_curve_of_the_explorer_is_the_spectrum_of_the_update(updates, explorer):
    figure = explorer.figure(method="LoRA r=4")
    update = updates["LoRA r=4"]["model.layers.0.mlp.up_proj"].dense()
    drawn = torch.tensor(figure.axes[0].lines[1].get_ydata())
    assert torch.allclose(drawn, torch.linalg.svdvals(update)[:4], atol=1e-4)
    assert explorers.title(figure) == "layer 0, up"


@pytest.mark.parametrize("k", explore.RANKS)
def test_the_explorer_draws_every_k_for_every_method(updates, explorer, k):
    for method in updates:
        assert explorers.title(explorer.figure(method=method, k=k), axes=1).startswith(f"k = {k}:")


def test_the_explorer_has_a_control_for_each_argument(updates):
    explorer = explorers.Explorer(
        explore, lambda: explore.update_explorer(updates, lambda method, k: 0.0), True
    )
    assert set(explorer.controls) == {"method", "layer", "k"}


def test_the_explorer_needs_updates():
    for nothing in ({}, {"full": {}}):
        with pytest.raises(ValueError, match="updates is empty"):
            explore.update_explorer(nothing, lambda method, k: 0.0)


def test_controls_and_intruders_are_drawn_where_they_are_given(updates):
    method, layer = next((m, next(iter(u))) for m, u in updates.items())
    known = {method: {0: 0.0, 8: 0.8}, "random directions": {1: 0.1, 8: 0.2}}
    count = lambda method, layer, epsilon: round(10 * epsilon)  # noqa: E731
    explorer = explorers.Explorer(
        explore,
        lambda: explore.update_explorer(updates, lambda method, k: 0.5, known, count),
        interactive=True,
    )
    figure = explorer.draw and explorer.figure(method=method, layer=layer, k=4, epsilon=0.9)
    assert "intruders at ε = 0.9: 9" in explorers.title(figure)
    assert "random directions" in [text.get_text() for text in figure.axes[1].texts]
    assert "epsilon" in explorer.controls
