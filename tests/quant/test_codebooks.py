"""The codebooks against bitsandbytes' tables and generators, Yoshida's published one, and their
definitions.
"""

import bitsandbytes.functional as bnb
import pytest
import torch

from labkit.quant.codebooks import (
    CODEBOOKS,
    codebook,
    codes_by_rank,
    dynamic8,
    fp4,
    fp4_e3m0,
    int4,
    midpoints,
    nf4,
    optimal,
)

FOUR_BIT = ["nf4", "fp4", "fp4-e3m0", "int4", "optimal-64"]


def nonzero(levels):
    return levels[levels != 0]


def test_nf4_equals_bitsandbytes_table_and_generator():
    pytest.importorskip("scipy", reason="bitsandbytes' create_normal_map needs scipy")
    assert torch.equal(nf4(), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(nonzero(nf4()), nonzero(bnb.create_normal_map()))


def test_nf4_with_another_offset_equals_bitsandbytes_generator():
    pytest.importorskip("scipy", reason="bitsandbytes' create_normal_map needs scipy")
    assert torch.equal(nonzero(nf4(0.98)), nonzero(bnb.create_normal_map(offset=0.98)))


def test_fp4_equals_bitsandbytes_table_in_its_order_of_codes():
    assert torch.equal(fp4(), bnb.get_4bit_type("fp4", "cpu"))


def test_fp4_e3m0_equals_bitsandbytes_generator_of_floating_point_maps():
    assert torch.equal(nonzero(fp4_e3m0()), nonzero(bnb.create_fp8_map(True, 3, 0, 4)))


def test_int4_is_the_integers_over_seven():
    assert torch.equal(int4().unique() * 7, torch.arange(-7.0, 8.0))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic8_equals_bitsandbytes_generator(signed):
    assert torch.equal(dynamic8(signed), bnb.create_dynamic_map(signed=signed))


def test_optimal_with_an_edge_at_zero_is_the_published_af4_table():
    published = bnb.get_4bit_type("af4", "cpu").sort().values
    torch.testing.assert_close(optimal(64, edge_at_zero=True), published, rtol=0, atol=1e-5)


def mean_scaled_error(levels, scaled):
    """Mean |error| after rounding to the nearest level, by brute force over all levels."""
    return min_distance(levels, scaled).mean().item()


def min_distance(levels, scaled):
    distance = (scaled - levels[0]).abs()
    for level in levels[1:]:
        distance = torch.minimum(distance, (scaled - level).abs())
    return distance


@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_optimal_has_less_error_than_nf4_and_than_any_shifted_level(blocksize):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(600_000 // blocksize, blocksize, generator=generator)
    scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).view(-1)
    levels = optimal(blocksize)
    least = mean_scaled_error(levels, scaled)
    assert least < mean_scaled_error(nf4(), scaled)
    for i in [1, 6, 8, 12]:
        for shift in (-0.02, 0.02):
            moved = levels.clone()
            moved[i] += shift
            assert mean_scaled_error(moved, scaled) > least


def test_optimal_is_better_than_the_published_table():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(30_000, 64, generator=generator)
    scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).view(-1)
    published = bnb.get_4bit_type("af4", "cpu")
    assert mean_scaled_error(optimal(64), scaled) < 0.98 * mean_scaled_error(published, scaled)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_every_4bit_codebook_has_16_levels_from_minus_one_to_one_and_a_zero_of_rank_seven(name):
    levels = codebook(name)
    rising = levels[codes_by_rank(levels).int()]
    assert levels.dtype == torch.float32 and levels.shape == (16,)
    assert (rising.diff() >= 0).all() and rising[0] == -1 and rising[7] == 0 and rising[15] == 1
    assert int((midpoints(levels) < 0).sum()) == 7


def test_unknown_names_and_impossible_block_sizes_are_refused():
    with pytest.raises(ValueError, match=r"'nf5' is not known; choose one of .*'nf4'"):
        codebook("nf5")
    with pytest.raises(ValueError, match="use 2 or more"):
        codebook("optimal-1")
    assert all(len(levels) in (16, 256) for levels in CODEBOOKS.values())
