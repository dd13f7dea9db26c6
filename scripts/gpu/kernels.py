"""The kernels of a GPU: their tests, their bits, and bytes per second beside a copy and bitsandbytes' kernels.

Each of them is bound by memory, if it is good: so many bytes must be read and written, and a copy of as many says how fast the
device can do that. Between two calls on the same bytes lie more bytes than the L2 cache holds, and the calls run as one
CUDA graph, without Python between them; the time that Python takes is a row of its own.

Bits are those of the reference on the CPU: of a weight's first and last million, of a product's first and last rows.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from gpu.kernel_rows import (
    crossover,
    dequantize_row,
    host_time,
    multiply_row,
    quantize_row,
    scales_row,
    settings,
)
from gpu.kernel_tests import interpret, run_gpu_tests
from gpu.measurement import Measurement, Numbers, Section, Skipped, Stage, laps, spread
from labkit.quant.kernels.dispatch import has_kernels

SHAPES = ((4096, 14336), (4096, 4096), (8192, 28672))  # of Llama 3 8B, and the largest of the 70B
SMALL = ((128, 256), (64, 64), (256, 512))
ROWS = (1, 4, 8)
COPIED = 1 << 30  # bytes
ROOM = 3 * 10**9  # bytes beside a weight: those that take turns with it, and what is compared
SHARE = 0.8  # of the copy: the goal


def measurements(stage: Stage) -> list[Measurement]:
    """Tests and copy; one shape; what settings follow from; then the other shapes, dtypes and scales."""
    main, *others = SHAPES if stage.cuda else SMALL
    half = stage.dtype
    found = [
        Measurement("tests marked gpu", run_gpu_tests, packages=("pytest",), seconds=25),
        Measurement("device copy", device_copy, needs_bytes=2 * COPIED if stage.cuda else 0, seconds=1),
        dequantizing(main, half),
        quantizing(main, half),
        *(multiplying(main, half, tokens) for tokens in ROWS),
    ]
    if stage.cuda:
        found += [
            taken("rows up to which nothing is dequantized,", crossover, main),
            taken("size of a program that dequantizes", settings, main),
        ]
    found += [Measurement("Python's part of a call", host_time, seconds=1)]
    for shape in others:
        found += [dequantizing(shape, half), multiplying(shape, half, 1), quantizing(shape, half)]
    found += [dequantizing(main, half, nested=False), multiplying(main, half, 1, nested=False)]
    if half != torch.float32:
        fp32 = torch.float32
        found += [dequantizing(main, fp32), quantizing(main, fp32), multiplying(main, fp32, 1)]
    found += [taken("quantize scales of", scales_row, others[-1])]
    if not stage.cuda:
        found += [Measurement("Triton's interpreter", interpret, packages=("triton",))]
    written_in = (
        ("triton",) if stage.cuda else ("numba",)
    )  # without it the reference runs, and there is no kernel
    return [
        one if one.packages or one.run is device_copy else replace(one, packages=written_in) for one in found
    ]


def taken(words: str, row: Callable[..., Numbers], shape: tuple[int, int], **rest) -> Measurement:
    """A row at one shape."""
    n, words = shape[0] * shape[1], f"{words} {shape[0]}×{shape[1]}"
    if "dtype" in rest:
        words += f", {str(rest['dtype']).removeprefix('torch.')}"
    if "nested" in rest:
        words += ", double quantization" if rest["nested"] else ", plain scales"
    needs = ROOM + 12 * n if shape in SHAPES else 0
    run = partial(with_kernels, row=partial(row, shape=shape, **rest))
    return Measurement(words, run, needs_bytes=needs, seconds=3)


def with_kernels(stage: Stage, row: Callable[[Stage], Numbers]) -> Numbers:
    """A row, where there are kernels to measure."""
    if not has_kernels(torch.empty(0, device=stage.device)):
        raise Skipped(
            "there are no kernels for this device: they need Triton, a C compiler and compute capability 7.5, or numba"
        )
    return row(stage)


def dequantizing(shape: tuple[int, int], dtype: torch.dtype, nested: bool = True) -> Measurement:
    """To a dtype."""
    return taken("dequantize", dequantize_row, shape, dtype=dtype, nested=nested)


def quantizing(shape: tuple[int, int], dtype: torch.dtype) -> Measurement:
    """From a dtype; the scales are a row of their own."""
    return taken("quantize", quantize_row, shape, dtype=dtype)


def multiplying(shape: tuple[int, int], dtype: torch.dtype, tokens: int, nested: bool = True) -> Measurement:
    """By so many rows of x."""
    words = f"multiply, {tokens} row{'s' * (tokens > 1)},"
    return taken(words, multiply_row, shape, dtype=dtype, tokens=tokens, nested=nested)


def device_copy(stage: Stage) -> Numbers:
    """Bytes read and written per second by a copy from the device's memory to itself."""
    n = COPIED if stage.cuda else 1 << 22
    source, target = (torch.zeros(n, dtype=torch.uint8, device=stage.device) for _ in range(2))
    seconds = laps({"copy": lambda: target.copy_(source)}, stage, rounds=9)["copy"]
    return {"gb_per_s": 2 * n / statistics.median(seconds) / 1e9, "bytes": 2 * n, **spread(seconds)}


def conclude(rows: dict[str, Numbers]) -> list[str]:
    """Tests, bits, the share of a copy, bitsandbytes, and what the settings should be."""
    kernels = {key: row for key, row in rows.items() if "equal_bits" in row}
    found = []
    if tests := rows.get("tests marked gpu"):
        found.append(
            f"Of the tests marked gpu, {tests['passed']} passed, {tests['failed']} failed and "
            f"{tests['skipped']} were skipped."
        )
    wrong = [key for key, row in kernels.items() if not row["equal_bits"]]
    if kernels:
        said = f"not in {'; '.join(wrong)}" if wrong else "in all of them"
        found.append(f"Bits equal to the reference's, in {len(kernels)} measurements: {said}.")
    for kind in ("dequantize", "quantize", "multiply, 1 row"):
        shares = [row["share_of_copy"] for key, row in kernels.items() if is_of(key, kind)]
        if shares:
            met = "met" if min(shares) >= SHARE else "not met"
            found.append(
                f"{kind}: {min(shares):.2f} to {max(shares):.2f} of the bytes per second of a copy; goal {SHARE}, {met}."
            )
        peers = [row["over_peer"] for key, row in kernels.items() if is_of(key, kind) and row["over_peer"]]
        if peers:
            met = "met" if min(peers) >= 1 else "not met"
            found.append(f"{kind}: {min(peers):.2f} to {max(peers):.2f} times bitsandbytes; goal 1, {met}.")
    for limit in (row for key, row in rows.items() if key.startswith("rows up to which")):
        found.append(
            f"Up to {limit['limit']} rows it is no slower to multiply without a dequantized weight; FEW_ROWS_ON_GPU is "
            f"{limit['limit_now']}."
        )
    for size in (row for key, row in rows.items() if key.startswith("size of a program")):
        found.append(f"Programs of {size['best']} dequantize fastest; {size['now']} are used.")
    return found


def is_of(key: str, kind: str) -> bool:
    """Is a row of this kind?"""
    return key.startswith(kind) and "scales of" not in key


SECTION = Section(
    "kernels",
    "Kernels: equal bits, and bytes per second",
    measurements,
    {
        "equal_bits": "equal bits",
        "gb_per_s": "GB/s",
        "share_of_copy": "of a copy",
        "over_peer": "× bitsandbytes",
        "median_s": "s",
        "passed": "passed",
        "failed": "failed",
        "skipped": "skipped",
    },
    conclude,
)
