"""The price of the scales: both block sizes and a model, with the error measured on real weights."""

from collections.abc import Callable, Mapping

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from torch import Tensor

from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.quant.blockwise import dequantize_blocks, quantize_blocks
from labkit.quant.codebooks import dynamic8, nf4

# weights in the decoder's linear layers, without embeddings and output layer; 33B and 65B are LLaMA 1
LINEAR_WEIGHTS = {
    "7B": 6_476_005_376,
    "13B": 12_687_769_600,
    "33B": 32_102_154_240,
    "65B": 64_760_053_760,
    "70B": 68_451_041_280,
}
BLOCKSIZES = (32, 64, 128, 256, 512)
NESTED_BLOCKSIZES = (16, 64, 256, 1024, 4096)


def even(bits: int) -> Tensor:
    """Equal steps, symmetric: 2^bits - 1 levels."""
    top = 2 ** (bits - 1) - 1
    return torch.arange(-top, top + 1) / top


DYNAMIC = "dynamic map, 8 bits"
TABLES: dict[str, tuple[int, Callable[[], Tensor]]] = {  # bits of a scale, and its levels
    DYNAMIC: (8, dynamic8),
    "linear steps, 8 bits": (8, lambda: even(8)),
    "linear steps, 6 bits": (6, lambda: even(6)),
    "linear steps, 4 bits": (4, lambda: even(4)),
}
CASTS = {"bf16": torch.bfloat16, "fp8 (e4m3)": torch.float8_e4m3fn}
SCALE_FORMATS = (*TABLES, *CASTS)


def scale_bits(scales: str, blocksize: int, nested_blocksize: int) -> float:
    """Bits of constants per weight, of whole blocks."""
    if scales in CASTS:
        return 8 * CASTS[scales].itemsize / blocksize
    return TABLES[scales][0] / blocksize + 32 / (blocksize * nested_blocksize)


def measure(weight: Tensor, blocksize: int, nested_blocksize: int, scales: str = DYNAMIC) -> dict[str, float]:
    """Quantize to NF4, then the scales to a format in blocks of any size; count bytes, measure errors.

    Args:
        weight: fp32, any shape.
        blocksize: weights per scale.
        nested_blocksize: scales per scale of scales; `labkit.quantize` uses 256, as bitsandbytes does. A cast
            to bf16 or fp8 has none.
        scales: one of `SCALE_FORMATS`.

    Returns:
        "constant bytes", and "constant bytes, fp32" without double quantization; "bits" and "bits, fp32",
            those of all
        constants per weight; "error" and "error, fp32", the norm of the error over the norm of the weight.
    """
    flat, levels = weight.detach().reshape(-1).float(), nf4()
    codes, absmax = quantize_blocks(flat, levels, blocksize)
    if scales in CASTS:
        back, size = absmax.to(CASTS[scales]).float(), absmax.numel() * CASTS[scales].itemsize
    else:
        width, table = TABLES[scales]
        offset = absmax.mean()
        scale_codes, nested = quantize_blocks(absmax - offset, table(), nested_blocksize)
        back = dequantize_blocks(scale_codes, nested, table(), nested_blocksize) + offset
        size = scale_codes.numel() * width // 8 + nested.nbytes + offset.nbytes

    def error(scales: Tensor) -> float:
        return ((dequantize_blocks(codes, scales, levels, blocksize) - flat).norm() / flat.norm()).item()

    return {
        "constant bytes": size,
        "constant bytes, fp32": absmax.nbytes,
        "bits": 8 * size / flat.numel(),
        "bits, fp32": 8 * absmax.nbytes / flat.numel(),
        "error": error(back),
        "error, fp32": error(absmax),
    }


def constants_explorer(weights: Mapping[str, Tensor]) -> None:
    """Choose the two block sizes, the format of the scales, a model and a weight. Left: bits of constants per weight, and their
    gigabytes in that model. Right: the error of that weight at every block size, measured live, with fp32
    scales and with scales in that format.

    Args:
        weights: {name: weight}; with a million numbers each, the controls respond at once.

    Raises:
        ValueError: no weights.
    """
    if not weights:
        raise ValueError("give at least one weight to measure on, as {name: tensor}")

    def draw(weight: str, blocksize: int, nested_blocksize: int, model: str, scales: str = DYNAMIC) -> None:
        sizes = sorted({*BLOCKSIZES, blocksize})
        rows = {size: measure(weights[weight], size, nested_blocksize, scales) for size in sizes}
        chosen, n = rows[blocksize], LINEAR_WEIGHTS[model]
        figure, (left, right) = canvas(width=9, height=3.2, columns=2)
        # exact for whole blocks, which these models have
        nested = scale_bits(scales, blocksize, nested_blocksize)
        named = "double quantization" if scales == DYNAMIC else scales
        bits = {"fp32 scales": 32 / blocksize, named: nested}
        colours = [COLOURS["base"], COLOURS["constants"]]
        bars = left.barh(list(bits), list(bits.values()), color=colours, height=0.6)
        labels = [f"{b:.3f} bits: {b * n / 8e9:.2f} GB" for b in bits.values()]
        left.bar_label(bars, labels, padding=3, fontsize=10)
        left.set_xlim(0, 1.75 * max(bits.values()))
        left.invert_yaxis()
        finish(left, f"Constants of a {model} model", "bits per weight", "")
        for key, colour, style in (("error, fp32", "base", "o-"), ("error", "nf4", "s--")):
            right.plot(sizes, [rows[size][key] for size in sizes], style, color=COLOURS[colour], markersize=6)
        right.axvline(blocksize, color=COLOURS["control"], linewidth=1, zorder=0)
        added = chosen["error"] / chosen["error, fp32"] - 1
        text = f"block {blocksize}: {named} adds {added:+.2%}\n● grey: fp32 scales, ■ violet: {scales}"
        right.text(0.03, 0.97, text, transform=right.transAxes, va="top", fontsize=9.5)
        right.set_xscale("log", base=2)
        right.set_xticks(sizes, [str(size) for size in sizes])
        low, high = right.get_ylim()
        right.set_ylim(low, high + 0.3 * (high - low))
        finish(right, f"Error of {weight}", "block size (weights per scale)", "|error| / |weight|")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        wide = {"style": {"description_width": "8em"}, "layout": {"width": "28em"}}
        controls = {
            "weight": Dropdown(options=list(weights), description="weight", **wide),
            "blocksize": SelectionSlider(options=BLOCKSIZES, value=64, description="block size", **wide),
            "nested_blocksize": SelectionSlider(
                options=NESTED_BLOCKSIZES, value=256, description="block of scales", **wide
            ),
            "model": SelectionSlider(options=list(LINEAR_WEIGHTS), value="7B", description="model", **wide),
            "scales": Dropdown(options=SCALE_FORMATS, description="scales in", **wide),
        }
    start = {"weight": next(iter(weights)), "blocksize": 64, "nested_blocksize": 256, "model": "7B"}
    panel(draw, controls, [start])
