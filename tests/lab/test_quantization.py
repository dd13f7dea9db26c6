"""The furniture of `06_nf4_from_scratch`: checks that name mistakes, and its explorer in both of its
forms.
"""

import pytest
import torch

from labkit.lab.check import NotYet
from labkit.lab.check import quantization as check
from labkit.lab.explore import quantization as explore
from labkit.quant.blockwise import pack, unpack
from labkit.quant.codebooks import nf4
from labkit.quant.tensor import quantize
from tests.lab import exercise_checks, explorers


def halves(n_below, n_above, offset, zeros=1):
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(offset, 0.5, n + 1)[:-1].double())

    return torch.cat([-quantiles(n_below), torch.zeros(zeros), quantiles(n_above)]).sort().values


def normal_float(bits, offset):
    levels = halves(2 ** (bits - 1) - 1, 2 ** (bits - 1), offset)
    return levels / levels.max()


def over(flat, blocksize, scale):
    return torch.cat([block / scale(block) for block in flat.split(blocksize)])


def absmax(block):
    return block.abs().max().clamp(min=1e-38)


def mid(levels):
    return (levels[1:] + levels[:-1]) / 2


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.outlier_victims,
        lambda p, n, b: (p - p % b, min(p - p % b + b, n)),
        [
            (lambda p, n, b: (p - p % b, p - p % b + b), "last block may be shorter"),
            (lambda p, n, b: (p - b // 2, p + b // 2), "do not move with the outlier"),
            (lambda p, n, b: (0, n), "one scale for the whole tensor"),
            (lambda p, n, b: (p // b, p // b + 1), "number of the block"),
            (lambda p, n, b: (p - p % b, min(p - p % b + b, n) - 1), "one past the last"),
        ],
    )
    yield (
        check.unpack_nibbles,
        unpack,
        [
            (lambda p, n: torch.cat([p & 15, p >> 4], dim=1).view(-1)[:n], "nibbles are swapped: the first"),
            (lambda p, n: torch.cat([p >> 4, p & 15], dim=1).view(-1), "n is odd"),
            (lambda p, n: torch.cat([p & 15, p >> 4], dim=1).view(-1), "swapped, and the padding"),
            (lambda p, n: torch.cat([p >> 4, p & 15]).view(-1)[:n], "all high nibbles come first"),
            (lambda p, n: torch.cat([p >> 4, p], dim=1).view(-1)[:n], "mask it with `& 15`"),
            (lambda p, n: torch.cat([p & 240, p & 15], dim=1).view(-1)[:n], "use `>> 4`"),
        ],
    )
    yield (
        check.nearest_code,
        # argmin takes the first, so the lower, of a tie
        lambda x, levels: (x[:, None] - levels).abs().argmin(dim=1),
        [
            (lambda x, levels: (x[:, None] >= mid(levels)).sum(dim=1), "ties go to the lower level"),
            (lambda x, levels: (x[:, None] > levels).sum(dim=1), "decision is made at the midpoints"),
            (lambda x, levels: ((x[:, None] >= levels).sum(dim=1) - 1).clamp(min=0), "rounds down"),
            (lambda x, levels: levels[(x[:, None] > mid(levels)).sum(dim=1)], "what is stored is its index"),
            (lambda x, levels: (x[:, None] - levels).argmin(dim=1), "needs an absolute value"),
            (lambda x, levels: ((x + 1) / 2 * 15).round(), "evenly spaced"),
        ],
    )
    yield (
        check.scale_blocks,
        lambda flat, b: over(flat, b, absmax),
        [
            (lambda flat, b: over(flat, b, lambda block: block.abs().max()), "block of zeros became NaN"),
            (
                lambda flat, b: over(flat, b, lambda block: block.max().clamp(min=1e-38)),
                "largest \\*magnitude\\*",
            ),
            (lambda flat, b: flat / flat.abs().max(), "one scale for the whole tensor"),
            (lambda flat, b: over(flat[: len(flat) // b * b], b, absmax), "incomplete last block is missing"),
            (lambda flat, b: over(flat, b, torch.std), "standard deviation"),
            (lambda flat, b: torch.cat([x * absmax(x) for x in flat.split(b)]), "to get into .*divide"),
        ],
    )
    yield (
        check.normal_float,
        normal_float,
        [
            (lambda k, o: halves(2 ** (k - 1) - 1, 2 ** (k - 1), o), "not divided by the largest"),
            (lambda k, o: (x := halves(2 ** (k - 1), 2 ** (k - 1), o, 0)) / x.max(), "no code for zero"),
            (lambda k, o: (x := halves(2 ** (k - 1), 2 ** (k - 1), o)) / x.max(), "one level too many"),
            (
                lambda k, o: (x := halves(2 ** (k - 1), 2 ** (k - 1) - 1, o)) / x.max(),
                "yours is the negative",
            ),
            (lambda k, o: normal_float(k, 1.0), "outermost level is infinite"),
            (
                lambda k, o: (x := torch.special.ndtri(torch.linspace(1 - o, o, 2**k).double())) / x.max(),
                "no exact zero; build the two sides separately",
            ),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


def test_a_fixed_offset_is_named_when_another_is_asked_for():
    for _ in range(20):
        with pytest.raises(NotYet, match="yours is fixed"):
            check.normal_float(lambda bits, offset: normal_float(bits, 0.9677083))


def test_the_solutions_of_the_checks_are_what_labkit_computes():
    assert torch.allclose(normal_float(4, 0.9677083).float(), nf4(), rtol=0, atol=1e-6)
    codes = torch.randint(0, 16, (33,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes), 33), codes)


# The explorer


def weights():
    torch.manual_seed(0)
    return {"normal": torch.randn(96, 100), "zeros": torch.zeros(70)}


@pytest.fixture(scope="module")
def explorer():
    return explorers.Explorer(explore, lambda: explore.codebook_explorer(weights()))


def bar_widths(figure):
    return {
        label.get_text(): bar.get_width()
        for label, bar in zip(figure.axes[1].get_yticklabels(), figure.axes[1].patches)
    }


def test_the_bars_of_the_explorer_are_the_errors_of_quantize(explorer):
    weight = weights()["normal"]
    for name, percent in bar_widths(explorer.figure(outlier=0)).items():
        expected = quantize(weight, name, 64, double_quant=False).error(weight)["relative_norm"]
        assert percent == pytest.approx(100 * expected, rel=1e-4)


def test_headless_one_outlier_ruins_a_tensor_wide_scale_but_not_blocks():
    blocks, whole = explorers.shown(explore, lambda: explore.codebook_explorer(weights()))
    assert bar_widths(blocks)["nf4"] < 15 < 50 < bar_widths(whole)["nf4"]


@pytest.mark.parametrize("codebook", explore.NAMES)
def test_the_explorer_draws_the_levels_of_every_codebook(explorer, codebook):
    figure = explorer.figure(codebook=codebook)
    (lines,) = figure.axes[0].collections
    drawn = sorted(x for (x, _), _ in lines.get_segments())
    assert drawn == pytest.approx(sorted(explore.levels_of(codebook).tolist()))


@pytest.mark.parametrize("blocksize", explore.BLOCKSIZES)
def test_the_explorer_draws_every_block_size(explorer, blocksize):
    assert str(blocksize) in explorers.title(explorer.figure(blocksize=blocksize), axes=1)


@pytest.mark.parametrize("outlier", explore.OUTLIERS)
def test_the_explorer_draws_every_outlier(explorer, outlier):
    said = explorers.title(explorer.figure(outlier=outlier), axes=1)
    assert said.endswith(f"outlier {outlier} σ" if outlier else "no outlier")


def test_the_explorer_survives_a_weight_of_zeros(explorer):
    assert "1 of 16 used" in explorers.title(explorer.figure(weight="zeros", outlier=0))


def test_the_explorer_has_a_control_for_each_argument():
    explorer = explorers.Explorer(explore, lambda: explore.codebook_explorer({"a": torch.randn(64)}), True)
    assert set(explorer.controls) == {"weight", "codebook", "blocksize", "outlier"}


def test_the_explorer_needs_a_weight():
    with pytest.raises(ValueError, match="weights is empty"):
        explore.codebook_explorer({})


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_levels_of_the_derivation_are_normal_floats(bits):
    levels = explore.normal_levels(bits, 0.9677083)
    assert len(levels) == 2**bits and levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1
    if bits == 4:
        assert torch.allclose(levels, nf4(), atol=1e-6)


def test_the_offset_of_nf4_has_nearly_the_least_error():
    explorer = explorers.Explorer(explore, explore.levels_explorer)
    curve = explorer.figure(bits=4, offset=0.9677083).axes[1].lines[0].get_ydata()
    here = explorer.figure(bits=4, offset=0.9677083).axes[1].lines[1].get_ydata()[0]
    assert here < 1.03 * min(curve)
    assert len(explorers.shown(explore, explore.levels_explorer)) == 1
