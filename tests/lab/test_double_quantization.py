"""The furniture of `07_double_quantization`: checks that name mistakes, and the explorer of the scales."""

import pytest
import torch
from torch.nn import functional as F

import labkit
from labkit.lab.check import NotYet
from labkit.lab.check import double_quantization as check
from labkit.lab.explore import double_quantization as explore
from labkit.quant.codebooks import dynamic8, midpoints
from tests.lab import exercise_checks, explorers


def solved(absmax, levels, block=256):
    """The exercise's solution, written apart from the check's own."""
    mean = absmax.mean()
    out = torch.empty_like(absmax)
    for i in range(0, len(absmax), block):
        part = absmax[i : i + block] - mean
        largest = part.abs().max()
        nearest = (part[:, None] / largest - levels).abs().argmin(dim=1)
        out[i : i + block] = levels[nearest] * largest + mean
    return out


def without_mean(absmax, levels):
    blocks = F.pad(absmax, (0, -len(absmax) % 256)).view(-1, 256)
    largest = blocks.amax(dim=1, keepdim=True)
    return (levels[torch.bucketize(blocks / largest, midpoints(levels))] * largest).view(-1)[: len(absmax)]


def decade(steps, exponent):
    edges = torch.linspace(0.1, 1, steps + 1)
    return (edges[1:] + edges[:-1]) / 2 * 10.0**exponent


def pairs(levels):
    return torch.tensor([[levels[b // 16], levels[b % 16]] for b in range(256)])


def up(n, size):
    return (n + size - 1) // size


CASES = [
    (
        check.constant_bytes,
        lambda n, b: up(n, b) + 4 * up(up(n, b), 256) + 4,
        [
            (lambda n, b: up(n, b) + 4 * up(up(n, b), 256), "4 bytes are missing"),
            (lambda n, b: 4 * up(n, b), "without double quantization"),
            (lambda n, b: up(n, b) + 4, "scales of the scales are missing"),
            (lambda n, b: n // b + 4 * (n // b // 256) + 4, "round up, not down"),
            (lambda n, b: up(n, b) + 4 * (up(n, b) // 256) + 4, "4 bytes are missing"),
            (lambda n, b: up(n, 2) + up(n, b) + 4 * up(up(n, b), 256) + 4, "packed codes"),
            (lambda n, b: 8 * (up(n, b) + 4 * up(up(n, b), 256) + 4), "that is in bits"),
        ],
    ),
    (
        check.dynamic_decade,
        lambda d: decade(2**d, d - 6),
        [
            (lambda d: torch.linspace(0.1, 1, 2**d + 1)[1:] * 10.0 ** (d - 6), "these are the edges"),
            (lambda d: torch.linspace(0.1, 1, 2**d + 1)[:-1] * 10.0 ** (d - 6), "lower edges"),
            (lambda d: decade(2 ** (d + 1), d - 6), "unsigned map"),
            (lambda d: decade(2**d, 0), "factor 10\\^\\(decade - 6\\) is missing"),
            (lambda d: decade(2**d, d - 7), "off by one"),
            (lambda d: torch.arange(0.5, 2**d) / 2**d * 10.0 ** (d - 6), "begins at 0.1"),
            (
                lambda d: torch.cat([-decade(2**d, d - 6).flip(0), decade(2**d, d - 6)]),
                "negative levels are there too",
            ),
        ],
    ),
    (
        check.double_quantize,
        solved,
        [
            (lambda a, t: solved(a, t) - a.mean(), "not added back"),
            (without_mean, "not subtracted first"),
            (lambda a, t: solved(a, t, block=10**6), "one scale for all scales"),
            (lambda a, t: solved(a, t, block=64), "yours look like 64"),
            (lambda a, t: a, "nothing was quantized"),
        ],
    ),
    (
        check.pair_table,
        pairs,
        [
            (lambda t: pairs(t).flip(1), "nibbles are swapped"),
            (lambda t: pairs(t)[:, [1, 1]], "low four bits"),
            (lambda t: pairs(t)[:, [0, 0]], "high four bits"),
            (lambda t: pairs(t).T, "the table is transposed"),
            (lambda t: pairs(torch.arange(16)), "look them up"),
        ],
    ),
]


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(CASES)


def test_rounding_down_or_up_is_named():
    def rounded(shift):
        def function(absmax, levels):
            centred = absmax - absmax.mean()
            blocks = F.pad(centred, (0, -len(centred) % 256)).view(-1, 256)
            largest = blocks.abs().amax(dim=1, keepdim=True)
            below = (blocks[..., None] / largest[..., None] >= levels).sum(-1) - 1
            return (levels[(below + shift).clamp(0, 255)] * largest).view(-1)[: len(absmax)] + absmax.mean()

        return function

    for shift, message in ((0, "rounds down"), (1, "rounds up")):
        with pytest.raises(NotYet, match=message):
            check.double_quantize(rounded(shift))


def test_the_checks_solutions_agree_with_the_library():
    torch.manual_seed(0)
    weight = torch.randn(300, 640)
    q = labkit.quantize(weight)
    absmax = labkit.quantize(weight, double_quant=False).scales
    assert torch.allclose(solved(absmax, dynamic8()), q.absmax, atol=1e-6)
    assert up(weight.numel(), 64) + 4 * up(up(weight.numel(), 64), 256) + 4 == q.scales.nbytes


@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_measured_bits_and_error_equal_the_library_at_its_own_nested_blocksize(blocksize):
    torch.manual_seed(0)
    weight = torch.randn(100, 320)
    found = explore.measure(weight, blocksize, 256)
    nested = labkit.quantize(weight, blocksize=blocksize)
    plain = labkit.quantize(weight, blocksize=blocksize, double_quant=False)
    assert found["constant bytes"] == nested.scales.nbytes
    assert found["constant bytes, fp32"] == plain.scales.nbytes
    assert found["error"] == pytest.approx(nested.error(weight)["relative_norm"], rel=1e-5)
    assert found["error, fp32"] == pytest.approx(plain.error(weight)["relative_norm"], rel=1e-5)


def test_model_sizes_equal_the_sum_over_the_layers_of_the_real_configurations():
    def linears(hidden, mlp, layers, kv):
        return layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp)

    assert {
        "7B": linears(4096, 11008, 32, 4096),
        "13B": linears(5120, 13824, 40, 5120),
        "33B": linears(6656, 17920, 60, 6656),
        "65B": linears(8192, 22016, 80, 8192),
        "70B": linears(8192, 28672, 80, 1024),
    } == explore.LINEAR_WEIGHTS


def test_explorer_draws_a_static_figure_when_nobody_can_click():
    torch.manual_seed(0)
    weights = {"random": torch.randn(64, 256)}
    (figure,) = explorers.shown(explore, lambda: explore.constants_explorer(weights))
    assert len(figure.axes) == 2
    explorer = explorers.Explorer(explore, lambda: explore.constants_explorer(weights), interactive=True)
    assert set(explorer.controls) == {"weight", "blocksize", "nested_blocksize", "model", "scales"}
    with pytest.raises(ValueError, match="at least one weight"):
        explore.constants_explorer({})


@pytest.mark.parametrize("scales", explore.SCALE_FORMATS)
def test_every_format_of_the_scales_costs_its_bits_and_adds_some_error(scales):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    found = explore.measure(weight, 64, 256, scales)
    assert found["bits"] == pytest.approx(explore.scale_bits(scales, 64, 256), rel=0.02)
    assert found["error, fp32"] <= found["error"] * 1.001
