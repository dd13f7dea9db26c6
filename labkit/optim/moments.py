"""The two moments of AdamW in 8 bits, by a rounding that keeps what holds for exact ones.

The step divides m by √v, so an error matters where v is *small*, and a mean error does not show it. Rounded to the
nearest level, a gradient below 4e-4 of its block's largest becomes zero in v, and only below 3e-7 in m. Between
the two, ε alone is left of the denominator, and single weights jump. Three rules prevent it:

- v > 0 is stored as the smallest level at least;
- m² ≤ K² v, which all exact moments obey (`smallest_root`), is restored when they are read;
- m falls where the gradient is zero, as β₁ m does.

Source: 8-bit Optimizers (Dettmers et al. 2021), section 2. bitsandbytes on a CPU keeps v above 1e-5 of its
block's largest by the bins in which it looks codes up (`labkit.quant.blockwise.lookup_blocks`); its CUDA kernel
rounds v to zero too.
"""

import math

import torch
from torch import Tensor

from labkit.quant.blockwise import dequantize_blocks, quantize_blocks
from labkit.quant.codebooks import dynamic8
from labkit.quant.kernels import dispatch, operations

BLOCKSIZE = 256
MAPS = {"exp_avg": dynamic8(), "exp_avg_sq": dynamic8(signed=False)}
ZERO = 127  # the code of zero in the signed map
LAST_BITS = 1 + 1e-6  # two fp32 products that are equal on paper differ by less


def zero_moments(p: Tensor) -> dict[str, Tensor]:
    """Both moments of `p` in 8 bits, in any code: the scale of zero makes a zero of it."""
    state = {}
    for moment in MAPS:
        state[moment] = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
        state[f"{moment}_absmax"] = torch.zeros(
            -(-p.numel() // BLOCKSIZE), dtype=torch.float32, device=p.device
        )
    return state


def quantize_moment(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) fp32 to the nearest codes of `levels`, (n,) uint8, and one absmax per 256 of them."""
    if dispatch.quantizes_scales(values):
        return operations.quantize_scales(values, levels)
    return quantize_blocks(values, levels, BLOCKSIZE)


def quantize_moments(m: Tensor, v: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(codes, absmax) of both moments after a step with the gradient g; all (n,) fp32.

    The nearest codes, but for three cases. v > 0 gets the smallest level at least. Where g = 0, m is rounded
    towards zero: where levels lie far apart, the nearest to β₁ m is m again, for ever. And a moment that is not
    finite would take the 255 others of its block with it, by their scale: it is dropped. Its weight is NaN by
    now, as in PyTorch (or g² was infinite, and m / √v zero).
    """
    (m_codes, m_absmax), (v_codes, v_absmax) = map(quantize_moment, (m, v), MAPS.values())
    if not (m_absmax.isfinite().all() and v_absmax.isfinite().all()):
        lost = ~(m.isfinite() & v.isfinite())
        return quantize_moments(m.masked_fill(lost, 0), v.masked_fill(lost, 0), g)
    v_codes = torch.maximum(v_codes, (v > 0).byte())  # code 0 is zero, code 1 the smallest level
    if not g.all():
        back = dequantize_blocks(m_codes, m_absmax, MAPS["exp_avg"], BLOCKSIZE)
        outward = (g == 0) & (back.abs() > LAST_BITS * m.abs())
        m_codes = m_codes - (outward & (m_codes > ZERO)).byte() + (outward & (m_codes < ZERO)).byte()
    return [(m_codes, m_absmax), (v_codes, v_absmax)]


def read_moments(state: dict, at: slice, blocks: slice, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """A piece of both moments in fp32, with v raised to m² / K² where rounding has brought it below."""
    m, v = (
        dequantize_blocks(state[name][at], state[f"{name}_absmax"][blocks], levels, BLOCKSIZE)
        for name, levels in MAPS.items()
    )
    return m, torch.maximum(v, (m * smallest_root(*betas)).square_())


def smallest_root(beta1: float, beta2: float) -> float:
    """1 / K, the smallest √v / |m| that exact moments can have: by the inequality of Cauchy and Schwarz,

        (Σ (1-β₁) β₁ⁱ gᵢ)²  ≤  K² Σ (1-β₂) β₂ⁱ gᵢ²,      K² = (1-β₁)² / ((1-β₂) (1 - β₁²/β₂))

    0 if β₁² ≥ β₂, for which there is no bound.

    >>> round(1 / smallest_root(0.9, 0.999), 2)  # the longest step, in learning rates
    7.27
    """
    if beta1**2 >= beta2:
        return float(beta1 == beta2 == 0)
    return math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)) / (1 - beta1)
