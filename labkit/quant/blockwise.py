"""Block-wise quantization: store a weight as 4-bit indices into a codebook, and one scale per block.

Flatten the weight, cut it into blocks of 64, and for each block b keep its largest magnitude:

    absmax_b = max |w|
    code = index of the level nearest to w / absmax_b
    w' = levels[code] * absmax_b

One outlier then coarsens only the 63 weights beside it, not the whole matrix. The scales cost 32/64 = 0.5 bit
per weight. **Double quantization** stores them in 8 bits too: subtract their mean, and quantize the rest in
blocks of 256 with the dynamic 8-bit codebook: 8/64 + 32/(64*256) = 0.127 bit per weight.

Why flat blocks and not rows: the block size is then independent of the layer's width.

Sources: 8-bit Optimizers (Dettmers et al. 2022), section 2.1; QLoRA (Dettmers et al. 2023), section 3.
Agrees, bit for bit, with: bitsandbytes `quantize_4bit` and `dequantize_4bit`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.quant.codebooks import codebook as levels_of
from labkit.quant.codebooks import codes_by_rank, midpoints

NESTED_BLOCKSIZE = 256
SMALLEST_ABSMAX = 1e-38  # a block of zeros has no scale to divide by; this keeps 1/absmax finite


def quantize_blocks(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The nearest level of every value after its block is scaled into [-1, 1].

    Args:
        flat: (n,) fp32.
        levels: (k,) fp32 codebook.
        blocksize: values per block; the last block may be shorter.

    Returns:
        codes (n,) uint8 and absmax (ceil(n / blocksize),) fp32.
    """
    n = flat.numel()
    whole = n - n % blocksize
    blocks = flat[:whole].view(-1, blocksize)  # (n_whole, blocksize)
    absmax = blocks.abs().amax(dim=1)  # (n_whole,)
    # bitsandbytes multiplies: dividing by absmax rounds one code in eight million differently
    reciprocal = 1 / absmax.clamp(min=SMALLEST_ABSMAX)
    scaled = (blocks * reciprocal[:, None]).reshape(-1)
    if whole < n:  # the shorter last block: bitsandbytes divides here, and keeps the clamped scale
        last = flat[whole:].abs().max().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[whole:] / last])
    # "the number of midpoints below x": a tie goes to the lower level
    ranks = torch.bucketize(scaled.clamp(-1, 1), midpoints(levels).to(flat.device), out_int32=True)
    return codes_by_rank(levels).to(flat.device)[ranks], absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """`levels[code] * absmax` of its block: (n,) uint8 codes to (n,) fp32 values."""
    # index_select: five times as fast as levels[codes]
    values = levels.to(codes.device).index_select(0, codes.int())  # (n,)
    return values * absmax.repeat_interleave(blocksize)[: codes.numel()]


def pack(codes: Tensor, pad: int = 7) -> Tensor:
    """Two 4-bit codes to a byte, the first in the high half: (n,) uint8 to (ceil(n / 2), 1) uint8.

    An odd tail is filled with `pad`, the code of zero (7 in NF4), as bitsandbytes does.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
    [[18], [247]]
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad)])
    return ((codes[::2] << 4) | codes[1::2])[:, None]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: (ceil(n / 2), 1) bytes to (n,) codes."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[:n]


def lookup_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` to `dynamic8` through a table of 65,536 equal bins, as in bitsandbytes on a CPU.

    A bin holds one code, even if a threshold lies within it: about one scale in 600 goes to the level beside
    the nearest. There are two more differences: an incomplete last block is scaled like any other, and a zero
    gets code 0 where the reciprocal of the block's scale is infinite (in a block of zeros, or of numbers
    below 3e-39).
    """
    n = values.numel()
    blocks = F.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)  # (n_blocks, 256)
    nested = blocks.abs().amax(dim=1)  # (n_blocks,)
    scaled = (blocks * (1 / nested)[:, None]).nan_to_num(nan=-1)  # 0 times infinity
    bins = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).to(torch.int64)
    centres = torch.linspace(-1, 1, 65536, dtype=torch.float32, device=values.device)
    table = torch.bucketize(centres, midpoints(levels_of("dynamic8")).to(values.device)).to(torch.uint8)
    return table[bins].view(-1)[:n], nested


def multiply_in_order(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in fp32, in the order of additions that the GPU's kernel for few rows has.

    A *word* is eight weights of a row. The products of a word are added as a tree, ((0 + 1) + (2 + 3)) + ((4 + 5) +
    (6 + 7)). Each of 32 lanes adds up the sums of every 32nd word, from left to right, and the lanes are added as such
    a tree. So no row of the result depends on the other rows, nor on how the work is shared out.

    Args:
        x: (tokens, width) fp32, bf16 or fp16.
        weight: (height, width) in the dtype of x.

    Returns:
        (tokens, height) in the dtype of x.
    """
    products = x.float()[:, None, :] * weight.float()  # (tokens, height, width)
    words = F.pad(products, (0, -x.shape[1] % 256)).unflatten(-1, (-1, 32, 8))
    sums = torch.zeros_like(words[..., 0, :, 0])  # (tokens, height, 32)
    for word in add_pairs(words).unbind(-3):
        sums = sums + word[..., 0]
    return add_pairs(sums)[..., 0].to(x.dtype)


def add_pairs(values: Tensor) -> Tensor:
    """Add neighbours in the last dimension, (..., n) to (..., n / 2), and so on until one is left, (..., 1)."""
    while values.shape[-1] > 1:
        values = values[..., ::2] + values[..., 1::2]
    return values
