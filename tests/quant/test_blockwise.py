"""The readable reference: packing, and rounding scales by look-up as bitsandbytes does on a CPU."""

import bitsandbytes.functional as bnb
import pytest
import torch

from labkit.quant.blockwise import lookup_blocks, pack, unpack
from labkit.quant.codebooks import codebook as levels_of
from tests.quant.cases import (
    assert_same_bits,
)


def test_lookup_rounding_equals_bitsandbytes_in_every_bin():
    edges = torch.linspace(-1, 1, 255 * 4096).view(-1, 255)
    values = torch.cat([edges, torch.ones(len(edges), 1)], dim=1).view(-1)  # absmax 1 in every block of 256
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise.default(values, levels_of("dynamic8"), 256)
    assert_same_bits(lookup_blocks(values)[0], codes)


@pytest.mark.parametrize(
    "numbers", [(-2.4934e-39, 2.4933e-39), (-2.5e-39, 0, 2e-39), (3e-39, 1e-39, 0), (0, 0), (0, 1)]
)
def test_lookup_of_scales_whose_reciprocal_is_infinite_equals_bitsandbytes(numbers):
    values = torch.tensor([float(number) for number in numbers])
    codes, state = bnb.quantize_blockwise(values, code=bnb.create_dynamic_map(), blocksize=256)
    ours = lookup_blocks(values)
    assert_same_bits(ours[0], codes.view(-1))
    assert_same_bits(ours[1], state.absmax)


def test_pack_and_unpack_are_inverse():
    for n in (1, 2, 7, 64):
        codes = torch.randint(0, 16, (n,), dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes), n), codes)
