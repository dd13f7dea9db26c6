"""Bytes per second of a kernel beside those of a copy, and its bits beside the reference's on the CPU."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.measurement import Numbers, Stage, laps, spread
from labkit.quant.blockwise import dequantize_blocks, unpack
from labkit.quant.codebooks import codebook
from labkit.quant.tensor import NestedScales, QuantizedTensor

BEYOND_CACHE = 120 << 20  # bytes that lie between two calls on the same ones: twice the L2 cache of an H200
CHECKED = 1 << 20  # weights at either end whose bits are compared; whole blocks, also of scales

Calls = Sequence[Callable[[], Any]]


def number_of(stage: Stage, moved: int) -> int:
    """How many weights take turns, if a call on one of them moves so many bytes."""
    return 1 + BEYOND_CACHE // moved if stage.cuda else 1


def rates(stage: Stage, moved: int, ours: Calls, peers: Calls = ()) -> Numbers:
    """Bytes per second of our calls, of copies of as many bytes, and of a peer's calls.

    Args:
        stage: where.
        moved: bytes that one call must read and write.
        ours, peers: calls that take turns, each on tensors of its own.
    """
    half = [torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=stage.device) for _ in ours]
    copies = [partial(torch.empty_like(source).copy_, source) for source in half]
    ways = {"ours": as_one(ours, stage), "copy": as_one(copies, stage)}
    numbers: Numbers = {"bytes": moved}
    if peers:
        try:
            ways["peer"] = as_one(peers, stage)
        except Exception as error:  # another library's: our own numbers stand
            numbers["peer_error"] = type(error).__name__
    seconds = {way: [lap / len(ours) for lap in found] for way, found in laps(ways, stage).items()}
    speed = {way: moved / statistics.median(found) / 1e9 for way, found in seconds.items()}
    return numbers | {
        "gb_per_s": speed["ours"],
        "copy_gb_per_s": speed["copy"],
        "share_of_copy": speed["ours"] / speed["copy"],
        "peer_gb_per_s": speed.get("peer"),
        "over_peer": speed["ours"] / speed["peer"] if "peer" in speed else None,
        **spread(seconds["ours"]),
    }


def as_one(calls: Calls, stage: Stage) -> Callable[[], Any]:
    """All calls as one: on a GPU as a CUDA graph, without Python between them; each result in memory of its own."""
    if not stage.cuda:
        return lambda: [call() for call in calls]
    side, main = torch.cuda.Stream(stage.device), torch.cuda.current_stream(stage.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):  # compiles, and makes what is kept
        calls[0]()
    main.wait_stream(side)
    stage.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return partial(replay, graph, results, calls)


def replay(graph: "torch.cuda.CUDAGraph", *alive: Any) -> None:
    """Run a graph, whose tensors must be alive."""
    graph.replay()


def ends(n: int) -> list[slice]:
    """The first and the last of n weights, from whole blocks of scales on; all, if they are few."""
    last = (n - 1) // CHECKED * CHECKED
    return [slice(0, CHECKED), slice(last, n)] if last else [slice(0, n)]


def reference_of(q: QuantizedTensor, part: slice) -> Tensor:
    """The fp32 weights of a part that begins with a whole block of scales, by the reference on the CPU."""
    first, last = part.start // q.blocksize, -(-part.stop // q.blocksize)
    if isinstance(q.scales, NestedScales):
        nested = q.scales.absmax[first // 256 : -(-last // 256)].cpu()
        absmax = NestedScales(q.scales.codes[first:last].cpu(), nested, q.scales.offset.cpu()).dequantize()
    else:
        absmax = q.scales[first:last].cpu()
    packed = q.packed.view(-1)[part.start // 2 : -(-part.stop // 2)].cpu()
    codes = unpack(packed, part.stop - part.start)
    return dequantize_blocks(codes, absmax, codebook(q.codebook), q.blocksize)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Have both the same bits?"""
    ours, theirs = ours.cpu().contiguous(), theirs.cpu().contiguous()
    return ours.dtype == theirs.dtype and torch.equal(
        ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)
    )
