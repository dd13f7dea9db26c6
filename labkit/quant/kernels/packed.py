"""A 4-bit weight as the kernels take it: one value, up to the boundary of the registered operations."""

from typing import NamedTuple

from torch import Tensor


class PackedWeight(NamedTuple):
    """The bytes of a weight, and what is needed to read them.

    Attributes:
        packed: at least (n + 1) // 2 bytes; the first of two codes is in the high four bits.
        scales: (n_blocks,) fp32 absmax; or uint8 codes of it, if `nested` and `offset` say how to dequantize
            them.
        levels: (16,) fp32 codebook.
        blocksize: weights per scale, even.
        nested: (ceil(n_blocks / 256),) fp32 scales of the scales.
        offset: () fp32 mean of the scales.
    """

    packed: Tensor
    scales: Tensor
    levels: Tensor
    blocksize: int
    nested: Tensor | None = None
    offset: Tensor | None = None
