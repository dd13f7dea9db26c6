"""What each row of section kernels measures: quantize, dequantize, multiply, and the settings that they decide on."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu.kernel_rates import as_one, ends, number_of, rates, reference_of, same
from gpu.machine import has
from gpu.measurement import Numbers, Skipped, Stage, laps, spread
from labkit.quant import direct
from labkit.quant.blockwise import NESTED_BLOCKSIZE, multiply_in_order, pack, quantize_blocks
from labkit.quant.codebooks import dynamic8, nf4
from labkit.quant.kernels import operations
from labkit.quant.kernels.dispatch import kernels_on, multiplies
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor, quantize

CROSSOVER = (1, 2, 3, 4, 6, 8, 12, 16)  # rows of x
SETTINGS = ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16))  # words and warps of a program
CALLS = 200  # in a row, whose time in Python is taken
SOME = 32  # rows at either end of a weight whose products are compared

Shape = tuple[int, int]


def weight_of(stage: Stage, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Normal weights."""
    return torch.randn(shape, device=stage.device, dtype=dtype)


def peer_weights(stage: Stage, weights: list[Tensor], nested: bool) -> list[tuple[Tensor, Any]]:
    """The same weights as bitsandbytes quantizes them on a GPU; none where it is not installed."""
    if not (stage.cuda and has("bitsandbytes")):
        return []
    from bitsandbytes import functional as bnb

    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": nested}
    return [bnb.quantize_4bit(weight, **options) for weight in weights]


def dequantize_row(stage: Stage, shape: Shape, dtype: torch.dtype, nested: bool) -> Numbers:
    """4-bit weights to a dtype, in memory that is there."""
    n = shape[0] * shape[1]
    first = quantize(weight_of(stage, shape, dtype), double_quant=nested)
    moved = first.nbytes + n * dtype.itemsize
    dense = [weight_of(stage, shape, dtype) for _ in range(number_of(stage, moved))]
    weights = [quantize(weight, double_quant=nested) for weight in dense]
    peers = peer_weights(stage, dense, nested)
    outs = [torch.empty_like(weight) for weight in dense]
    got = weights[0].dequantize(dtype, out=outs[0]).view(-1)
    parts = ends(n)
    equal = all(same(got[part], reference_of(weights[0], part).to(dtype)) for part in parts)
    numbers = {"equal_bits": equal, "compared": sum(part.stop - part.start for part in parts)}
    theirs = []
    if peers:
        from bitsandbytes import functional as bnb

        theirs = [
            partial(bnb.dequantize_4bit, packed, state, out=out) for (packed, state), out in zip(peers, outs)
        ]
        numbers["peer_equal_bits"] = same(weights[0].dequantize(dtype), bnb.dequantize_4bit(*peers[0]))
    ours = [partial(weight.dequantize, dtype, out) for weight, out in zip(weights, outs)]
    return numbers | rates(stage, moved, ours, theirs)


def quantize_row(stage: Stage, shape: Shape, dtype: torch.dtype) -> Numbers:
    """A weight in a dtype to 4 bits, with plain scales."""
    n = shape[0] * shape[1]
    moved = n * dtype.itemsize + n // 2 + n // 64 * 4
    dense = [weight_of(stage, shape, dtype).view(-1) for _ in range(number_of(stage, moved))]
    read = dense if stage.cuda else [weight.float() for weight in dense]
    stage.wait()
    before = torch.cuda.memory_allocated(stage.device) if stage.cuda else 0
    packed, absmax = operations.quantize_4bit(read[0], nf4(), 64)
    equal = True
    for part in ends(n):
        codes, scales = quantize_blocks(dense[0][part].cpu().float(), nf4(), 64)
        blocks = slice(part.start // 64, -(-part.stop // 64))
        equal &= same(packed.view(-1)[part.start // 2 : -(-part.stop // 2)], pack(codes).view(-1))
        equal &= same(absmax[blocks], scales)
    numbers: Numbers = {"equal_bits": equal, "compared": sum(part.stop - part.start for part in ends(n))}
    if stage.cuda:
        torch.cuda.reset_peak_memory_stats(stage.device)
        operations.quantize_4bit(read[0], nf4(), 64)
        numbers["peak_bytes"] = torch.cuda.max_memory_allocated(stage.device) - before
    theirs = []
    if peers := peer_weights(stage, dense[:1], nested=False):
        # not bitsandbytes.functional.quantize_4bit: it copies a table from the host, which a graph cannot hold
        kernel = torch.ops.bitsandbytes.quantize_4bit.default
        theirs = [partial(kernel, weight, 64, "nf4", torch.uint8) for weight in dense]
        numbers["peer_equal_bits"] = same(packed.view(-1), peers[0][0].view(-1))
    ours = [partial(operations.quantize_4bit, weight, nf4(), 64) for weight in read]
    return numbers | rates(stage, moved, ours, theirs)


def scales_row(stage: Stage, shape: Shape) -> Numbers:
    """The scales of a weight, to 8 bits."""
    n = shape[0] * shape[1] // 64
    moved = n * 5 + -(-n // NESTED_BLOCKSIZE) * 4
    scales = [torch.randn(n, device=stage.device) for _ in range(number_of(stage, moved))]
    got = operations.quantize_scales(scales[0])
    expected = quantize_blocks(scales[0].cpu(), dynamic8(), NESTED_BLOCKSIZE)
    ours = [partial(operations.quantize_scales, values) for values in scales]
    equal = all(map(same, got, expected))
    return {"equal_bits": equal, "compared": n} | rates(stage, moved, ours)


def multiply_row(stage: Stage, shape: Shape, dtype: torch.dtype, tokens: int, nested: bool) -> Numbers:
    """A few rows of x by a weight that stays in 4 bits.

    Equal bits are those of `multiply_in_order`, and of each row by itself; the latter only on a CPU, whose kernel adds in an
    order of its own.
    """
    height, width = shape
    x = torch.randn(tokens, width, device=stage.device, dtype=dtype)
    if not multiplies(x, width):
        raise Skipped("there is no kernel that multiplies on this processor")
    first = quantize(weight_of(stage, shape, dtype), double_quant=nested)
    moved = first.nbytes + (tokens * (width + height)) * dtype.itemsize
    dense = [weight_of(stage, shape, dtype) for _ in range(number_of(stage, moved))]
    weights = [quantize(weight, double_quant=nested) for weight in dense]
    peers = peer_weights(stage, dense, nested)
    del dense
    y, whole = weights[0].multiply(x), weights[0].dequantize(dtype)
    some = torch.cat([torch.arange(SOME), torch.arange(height - SOME, height)]).to(stage.device)
    expected = multiply_in_order(x.cpu(), whole[some].cpu())
    alone = same(y, torch.cat([weights[0].multiply(row[None]) for row in x]))
    exact = F.linear(x.double(), whole.double())
    numbers = {
        "equal_bits": alone and (same(y[:, some], expected) or not stage.cuda),
        "compared": expected.numel(),
        "relative_error": float((y - exact).norm() / exact.norm()),
    }
    del whole, exact
    theirs = []
    if peers:
        import bitsandbytes

        theirs = [
            partial(bitsandbytes.matmul_4bit, x, packed.t(), quant_state=state) for packed, state in peers
        ]
    return numbers | rates(stage, moved, [partial(weight.multiply, x) for weight in weights], theirs)


def crossover(stage: Stage, shape: Shape) -> Numbers:
    """By rows of x, without a dequantized weight and with one: up to how many rows the first is as fast."""
    weights = [
        quantize(weight_of(stage, shape, stage.dtype)) for _ in range(number_of(stage, shape[0] * shape[1]))
    ]
    directly, made = [], []
    for rows in CROSSOVER:
        x = torch.randn(rows, shape[1], device=stage.device, dtype=stage.dtype)
        ways = {
            "direct": as_one([partial(weight.multiply, x) for weight in weights], stage),
            "made": as_one([partial(through_dense, x, weight) for weight in weights], stage),
        }
        seconds = laps(ways, stage, rounds=5)
        directly.append(spread(seconds["direct"])["median_s"] / len(weights))
        made.append(spread(seconds["made"])["median_s"] / len(weights))
    slower = [rows for rows, a, b in zip(CROSSOVER, directly, made) if a > b]
    limit = max((rows for rows in CROSSOVER if not slower or rows < slower[0]), default=0)
    return {
        "rows": list(CROSSOVER),
        "direct_s": directly,
        "dequantized_s": made,
        "limit": limit,
        "limit_now": direct.FEW_ROWS_ON_GPU,
    }


def through_dense(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """The product with a dequantized weight."""
    return F.linear(x, weight.dequantize(x.dtype))


def settings(stage: Stage, shape: Shape) -> Numbers:
    """Bytes per second of dequantizing, by the size of a program."""
    kernels = kernels_on(True)
    before, ways = (kernels.WORDS, kernels.WARPS), {}
    moved = quantize(weight_of(stage, shape, stage.dtype)).nbytes + shape[0] * shape[1] * stage.dtype.itemsize
    outs = [weight_of(stage, shape, stage.dtype) for _ in range(number_of(stage, moved))]
    calls = [partial(quantize(out).dequantize, stage.dtype, out) for out in outs]
    try:
        for words, warps in SETTINGS:
            kernels.WORDS, kernels.WARPS = words, warps
            ways[f"{words} words, {warps} warps"] = as_one(calls, stage)
    finally:
        kernels.WORDS, kernels.WARPS = before
    found = laps(ways, stage)
    speeds = {name: moved * len(outs) / spread(found[name])["median_s"] / 1e9 for name in ways}
    best, now = max(speeds, key=speeds.__getitem__), f"{before[0]} words, {before[1]} warps"
    return {"by_setting": speeds, "best": best, "gb_per_s": speeds[best], "now": now}


def host_time(stage: Stage) -> Numbers:
    """Seconds of Python that a call takes, on weights so small that the device waits for it."""
    layer = QuantLinear.from_linear(nn.Linear(64, 64, device=stage.device, dtype=stage.dtype))
    x = torch.randn(1, 64, device=stage.device, dtype=stage.dtype)
    out, rows = torch.empty(64, 64, device=stage.device, dtype=stage.dtype), x.expand(32, 64)
    calls = {
        "dequantize_s": partial(layer.weight.dequantize, stage.dtype, out),
        "layer_one_row_s": partial(layer, x),
        "layer_many_rows_s": partial(layer, rows),
        "dense_layer_s": partial(F.linear, x, out),
    }
    numbers = {}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            stage.wait()
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            numbers[name] = (time.perf_counter() - started) / CALLS
            stage.wait()
    return numbers
