"""The furniture of `11_variant_zoo`: checks that name mistakes, and its explorer in both of its forms."""

import pytest
import torch
from torch.nn import functional as F

from labkit.lab.check import variants as check
from labkit.lab.explore import variants as explore
from tests.lab import exercise_checks, explorers


def dora(x, W, A, B, m, s):
    return F.linear(x, F.normalize(W + s * (B @ A), dim=1) * m[:, None])


def split(W, r, s):
    """By the eigenvectors of W Wᵀ, where the check takes an SVD."""
    values, vectors = torch.linalg.eigh(W.double() @ W.double().T)
    U, S = vectors[:, -r:].float(), values[-r:].sqrt().float()
    A = (U.T @ W) / (S * s).sqrt()[:, None]
    return A, U * (S / s).sqrt(), W - U @ U.T @ W


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.rslora_scaling,
        lambda alpha, r, stabilized: alpha * r ** (-0.5 if stabilized else -1),
        [
            (lambda a, r, s: a / r, "alpha / r in both"),
            (lambda a, r, s: a * r**-0.5, r"alpha / sqrt\(r\) in both"),
            (lambda a, r, s: a * r ** (-1 if s else -0.5), "swapped"),
            (lambda a, r, s: (a / r) ** 0.5 if s else a / r, "r alone"),
            (lambda a, r, s: a * r**0.5 if s else a / r, "multiplies by it"),
            (lambda a, r, s: r ** (-0.5 if s else -1), "alpha is missing"),
        ],
    )
    yield (
        check.dora_forward,
        dora,
        [
            (lambda x, W, A, B, m, s: dora(x, W, A, B, m, 1), "scaling s is missing"),
            (lambda x, W, A, B, m, s: dora(x, W, A, B, torch.ones_like(m), s), "forgets m"),
            (lambda x, W, A, B, m, s: x @ W.T + s * x @ A.T @ B.T, "LoRA's forward"),
            (lambda x, W, A, B, m, s: (x @ W.T + s * x @ A.T @ B.T) * m, "direction"),
            (
                lambda x, W, A, B, m, s: (x @ W.T + s * x @ A.T @ B.T) * m / W.norm(dim=1),
                "those of W alone",
            ),
            (
                lambda x, W, A, B, m, s: (x @ W.T + s * x @ A.T @ B.T) * m / (W + s * B @ A).norm(dim=0),
                "norms of columns",
            ),
            (
                lambda x, W, A, B, m, s: (x @ W.T + s * x @ A.T @ B.T) * m / (W + s * B @ A).norm(),
                "each row has its own",
            ),
            (
                lambda x, W, A, B, m, s: dora(x, W, A, B, m, s) + (1 - m / (W + s * B @ A).norm(dim=1)) * (s * x @ A.T @ B.T),
                "the base alone",
            ),
            (
                lambda x, W, A, B, m, s: dora(x, W, A, B, m, s) + (1 - m / (W + s * B @ A).norm(dim=1)) * (x @ W.T),
                "the correction alone",
            ),
            (
                lambda x, W, A, B, m, s: (x @ W.T + s * x @ A.T @ B.T) * (W + s * B @ A).norm(dim=1) / m,
                "wrong way round",
            ),
        ],
    )  # fmt: skip

    def rest(W, s, A, B):
        return A, B, W - s * B @ A

    yield (
        check.pissa_split,
        split,
        [
            (lambda W, r, s: rest(W, s, *split(W, r, 1)[:2]), "s times too large"),
            (lambda W, r, s: split(W, r, 1), "in the factors and in the rest"),
            (lambda W, r, s: rest(W, 1, *split(W, r, s)[:2]), "forgets s there"),
            (lambda W, r, s: (*split(W, r, s)[:2], W), "count twice"),
            (lambda W, r, s: (s**0.5 * split(W, r, s)[1], split(W, r, s)[0], W), "expected"),
            (
                lambda W, r, s: (split(W, r, s)[1], split(W, r, s)[0], split(W, r, s)[2]),
                "swapped",
            ),
            (lambda W, r, s: all_in_A(W, r, s), "A has all"),
            (lambda W, r, s: all_in_B(W, r, s), "B has all"),
            (lambda W, r, s: smallest(W, r, s), "smallest"),
            (lambda W, r, s: split(W, r, s)[:2], "expected"),
        ],
    )

    def by_part(choose):
        return lambda names, lr, k: [choose(name.rpartition("_")[2], lr, k) for name in names]

    yield (
        check.lora_plus_rates,
        by_part(lambda part, lr, k: lr * k if part == "B" else lr),
        [
            (by_part(lambda part, lr, k: lr * k if part == "A" else lr), "it should be B's"),
            (by_part(lambda part, lr, k: lr if part == "A" else lr * k), "B alone"),
            (by_part(lambda part, lr, k: lr * k if part in "AB" else lr), "LoRA at another rate"),
            (by_part(lambda part, lr, k: lr / k if part == "B" else lr), "divides"),
            (by_part(lambda part, lr, k: lr if part == "B" else lr / k), "here lr is A's rate"),
            (by_part(lambda part, lr, k: lr), "one rate for all"),
            (by_part(lambda part, lr, k: k if part == "B" else 1.0), "multiply by lr"),
        ],
    )
    cat = torch.cat
    yield (
        check.plain_factors,
        # another order, another sign: the same product
        lambda A, B, A0, B0: (cat([-A0, A]), cat([B0, B], 1)),
        [
            (lambda A, B, A0, B0: (A - A0, B - B0), "not a product of differences"),
            (lambda A, B, A0, B0: (cat([A, A0]), cat([B, B0], 1)), "minus is missing"),
            (lambda A, B, A0, B0: (cat([A, -A0]), cat([B, -B0], 1)), "in both factors"),
            (lambda A, B, A0, B0: (cat([A, A0]), cat([-B, B0], 1)), "wrong way round"),
            (lambda A, B, A0, B0: (cat([A, A0]), cat([-B0, B], 1)), "order differs"),
            (lambda A, B, A0, B0: (A, B), "as it was trained"),
            (lambda A, B, A0, B0: (cat([B, -B0], 1), cat([A, A0])), "comes first"),
        ],
    )


def all_in_A(W, r, s):
    A, B, left = split(W, r, s)
    size = B.norm(dim=0)
    return A * size[:, None], B / size, left


def all_in_B(W, r, s):
    A, B, left = split(W, r, s)
    size = A.norm(dim=1)
    return A / size[:, None], B * size, left


def smallest(W, r, s):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B = (S[-r:] / s).sqrt()[:, None] * Vh[-r:], U[:, -r:] * (S[-r:] / s).sqrt()
    return A, B, W - s * B @ A


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The explorer


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 16, generator=generator), 0.01 * torch.randn(24, 16, generator=generator)


def test_loras_first_step_is_the_closed_form(layer):
    """B = 0: AdamW moves B by -lr sign(G Aᵀ), and A, whose gradient is zero, not at all."""
    W, G = layer
    step = explore.first_step(W, G, r=4, alpha=12, lr=1e-2)
    torch.manual_seed(0)
    A = torch.empty(4, 16)
    torch.nn.init.kaiming_uniform_(A, a=5**0.5)
    expected = -1e-2 * 3 * (G @ A.T).sign() @ A
    torch.testing.assert_close(step.change, expected, rtol=1e-5, atol=1e-7)
    assert not step.start.any() and torch.equal(step.base, W)
    assert step.promised == pytest.approx(0.03 * (G @ A.T).abs().sum().item(), rel=1e-4)


def test_lora_plus_steps_by_its_ratio_and_rslora_by_sqrt_r(layer):
    plain = explore.first_step(*layer, r=4, alpha=12, lr=1e-3)
    for name, factor in (("LoRA+", 16), ("rsLoRA", 2)):
        step = explore.first_step(*layer, r=4, alpha=12, lr=1e-3, **explore.VARIANTS[name])
        torch.testing.assert_close(step.change, factor * plain.change, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA"])
def test_starts_from_the_weight_leave_the_sum_as_it_was(layer, name):
    step = explore.first_step(*layer, r=4, alpha=12, lr=1e-3, **explore.VARIANTS[name])
    torch.testing.assert_close(step.start + step.base, layer[0], rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(step.start, atol=1e-4) == 4 and step.promised > 0


def test_doras_rows_change_their_length_by_the_magnitude_alone(layer):
    """After the step n has changed too, so every row has the length m: m0 ± lr."""
    step = explore.first_step(*layer, r=4, alpha=12, lr=1e-2, **explore.VARIANTS["DoRA"])
    lengths, turned = step.rows()
    torch.testing.assert_close(lengths.abs(), 1e-2 / layer[0].norm(dim=1), rtol=1e-3, atol=1e-5)
    assert (turned > 0).all()


def test_the_seed_of_the_reader_is_left_alone(layer):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    explore.first_step(*layer, r=4, alpha=12, lr=1e-2)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(ValueError, match="give the same shape"):
        explore.first_step(layer[0], layer[1].T, r=4, alpha=12, lr=1e-2)


@pytest.fixture
def given(layer):
    return {"model.layers.0.q_proj": layer[0]}, {"model.layers.0.q_proj": layer[1]}


def test_the_explorer_draws_headless_and_needs_gradients(layer, given):
    first, second = explorers.shown(explore, lambda: explore.variant_explorer(*given))
    assert explorers.title(first).startswith("DoRA, r=8") and explorers.title(second).startswith("PiSSA, r=8")
    with pytest.raises(ValueError, match="a gradient for each"):
        explore.variant_explorer({"a": layer[0]}, {})


@pytest.mark.parametrize("variant", explore.VARIANTS)
def test_the_explorer_draws_every_variant_at_the_lowest_and_the_highest_rank(given, variant):
    explorer = explorers.Explorer(explore, lambda: explore.variant_explorer(*given))
    for r, drawn in ((1, 1), (128, 16)):  # more than the layer is wide: as much as it has
        figure = explorer.figure(layer="0 · q_proj", variant=variant, r=r, alpha=16)
        assert len(figure.axes) == 2 and explorers.title(figure).startswith(f"{variant}, r={drawn},")


def test_the_explorer_has_a_control_for_each_choice(given):
    explorer = explorers.Explorer(explore, lambda: explore.variant_explorer(*given), interactive=True)
    controls = explorer.controls
    assert set(controls) == {"layer", "variant", "r", "alpha"}
    assert explorers.title(explorer.figure_at_controls()).startswith("LoRA, r=8, α=16")
    controls["variant"].value, controls["r"].value = "PiSSA", 4
    assert explorers.title(explorer.figure_at_controls()).startswith("PiSSA, r=4, α=16")
