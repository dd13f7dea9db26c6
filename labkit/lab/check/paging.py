"""Checks of the exercises on paged and 8-bit optimizers: bytes, page faults, eviction, reading a moment."""

import itertools
import random
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from labkit.lab.check.compare import compare
from labkit.quant.codebooks import dynamic8


def state_bytes(function: Callable) -> None:
    """`function(n, bits)`: bytes of AdamW's two moments of n numbers: fp32, or 8 bits and a scale per 256."""

    def right(n: int, bits: int) -> int:
        return 8 * n if bits == 32 else 2 * (n + 4 * -(-n // 256))

    cases = [(256 * random.randint(5, 60) + random.randint(1, 255), bits) for bits in (8, 8, 8, 32, 32)]
    sizes = iter(random.sample(cases, 5))
    compare(
        "state_bytes",
        function,
        right,
        {
            "that is one moment; Adam keeps two": lambda n, b: right(n, b) // 2,
            "the scales are missing: one fp32 absmax per block of 256, for each moment": (
                lambda n, b: 8 * n if b == 32 else 2 * n
            ),
            "an incomplete last block needs a scale too: round up, not down": (
                lambda n, b: 8 * n if b == 32 else 2 * (n + 4 * (n // 256))
            ),
            "a scale is an fp32 number, four bytes": (
                lambda n, b: 8 * n if b == 32 else 2 * (n + -(-n // 256))
            ),
            "blocks have 256 numbers here; yours look like the 64 of 4-bit weights": (
                lambda n, b: 8 * n if b == 32 else 2 * (n + 4 * -(-n // 64))
            ),
            "that is one set of scales for both moments; each has its own": (
                lambda n, b: 8 * n if b == 32 else 2 * n + 4 * -(-n // 256)
            ),
            "that is in bits; there are eight to a byte": lambda n, b: 8 * right(n, b),
            "that is fp32 in both cases": lambda n, b: 8 * n,
        },
        lambda: next(sizes),
    )


def faults(
    sequence: list[int], capacity: int, refresh: bool = True, newest: bool = False, cold: bool = True
) -> int:
    """Page faults of a cache; the options are what people get wrong."""
    cache: OrderedDict[int, None] = OrderedDict()
    seen, count = set(), 0
    for page in sequence:
        if page in cache:
            if refresh:
                cache.move_to_end(page)
            continue
        count += cold or page in seen
        seen.add(page)
        if len(cache) == capacity:
            cache.popitem(last=newest)
        cache[page] = None
    return count


def lru_faults(function: Callable) -> None:
    """`function(sequence, capacity)`: page faults of LRU with room for `capacity` pages, empty at first."""

    def inputs():  # such that all mistakes below give different numbers
        while True:
            sequence, capacity = [random.randrange(8) for _ in range(60)], random.randint(3, 5)
            answers = [
                faults(sequence, capacity),
                faults(sequence, capacity, refresh=False),
                faults(sequence, capacity, newest=True),
                faults(sequence, capacity, cold=False),
                faults(sequence, capacity + 1),
                faults(sequence, capacity - 1),
                60 - faults(sequence, capacity),
                len(set(sequence)),
            ]
            if len(set(answers)) == len(answers):
                return sequence, capacity

    compare(
        "lru_faults",
        function,
        faults,
        {
            "those are the hits": lambda s, c: len(s) - faults(s, c),
            "a hit has to make its page the newest one; yours evicts the page that came *in* first (FIFO)": (
                lambda s, c: faults(s, c, refresh=False)
            ),
            "that evicts the most recently used page, which is MRU": lambda s, c: faults(s, c, newest=True),
            "the first use of a page is a fault as well: the cache is empty at first": (
                lambda s, c: faults(s, c, cold=False)
            ),
            "your cache holds one page too many: evict *before* the new page comes in": (
                lambda s, c: faults(s, c + 1)
            ),
            "your cache holds one page too few": lambda s, c: faults(s, c - 1),
            "that is the number of distinct pages; a page that was evicted faults again": lambda s, c: len(
                set(s)
            ),
        },
        inputs,
    )


def belady_victim(function: Callable) -> None:
    """`function(cached, future)`: the page in `cached` whose next use in `future` is farthest away."""

    def next_use(page: int, future: list[int]) -> int:
        return future.index(page) if page in future else len(future)

    def right(cached: list[int], future: list[int]) -> int:
        return max(cached, key=lambda page: next_use(page, future))

    def soonest(cached: list[int], future: list[int]) -> int:
        return min(cached, key=lambda page: next_use(page, future))

    def last_use(cached: list[int], future: list[int]) -> int:
        last = {page: n for n, page in enumerate(future)}
        return max(cached, key=lambda page: last.get(page, len(future)))

    def forgets_unused(cached: list[int], future: list[int]) -> int:
        return right([page for page in cached if page in future], future)

    # every other time there is a page that is never used again; the answers to distinguish are all different
    kinds = itertools.cycle([(True, forgets_unused), (False, last_use)])

    def inputs():
        with_unused, mistake = next(kinds)
        while True:
            cached, future = random.sample(range(9), 5), [random.randrange(9) for _ in range(24)]
            if sum(page not in future for page in cached) != with_unused:
                continue
            answers = {act(cached, future) for act in (right, soonest, mistake)} | {cached[0], cached[-1]}
            if len(answers) == 5:
                return cached, future

    mistakes = {
        "that is the page needed *soonest*": soonest,
        "a page that is never used again is the best one to evict: count it as infinitely far": forgets_unused,
        "look at the *next* use of each page, not at its last": last_use,
        "that is always the first page of the list": lambda c, f: c[0],
        "that is always the last page of the list": lambda c, f: c[-1],
    }
    compare("belady_victim", function, right, mistakes, inputs)


def read_moment(function: Callable) -> None:
    """`function(codes, absmax, levels)`: an 8-bit moment in fp32; blocks of 256, the last one incomplete."""

    def read(codes: Tensor, absmax: Tensor, levels: Tensor, block: int = 256) -> Tensor:
        return levels[codes.long()] * absmax.repeat_interleave(block)[: len(codes)]

    def inputs():
        n = 256 * random.randint(3, 6) + random.randint(1, 255)
        codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
        return codes, torch.rand(-(-n // 256)) + 0.5, dynamic8(signed=random.random() < 0.5)

    compare(
        "read_moment",
        function,
        read,
        {
            "the scales are missing: a level lies in [-1, 1]": lambda c, a, t: t[c.long()],
            "that is one scale for all; each block of 256 has its own": lambda c, a, t: t[c.long()] * a[0],
            "the codes were taken for numbers; they are indices into `levels`": (
                lambda c, a, t: c.float() * a.repeat_interleave(256)[: len(c)]
            ),
            "the scales repeat in turn: number i belongs to block i // 256, not to i % len(absmax)": (
                lambda c, a, t: t[c.long()] * a[torch.arange(len(c)) % len(a)]
            ),
            "that divides by the scale; multiply": (
                lambda c, a, t: t[c.long()] / a.repeat_interleave(256)[: len(c)]
            ),
            "the incomplete last block is missing": lambda c, a, t: read(c, a, t)[: len(c) // 256 * 256],
        },
        inputs,
    )
