"""Which adapters are in memory: a budget of bytes, and the least recently used one leaves.

The budget is in bytes, not adapters: one of rank 64 takes as much as sixteen of rank 4. An adapter that a request uses,
or that is pinned, stays. Reading a folder takes as long as many steps of generation, so another thread does it, and
requests whose adapters are there go on meanwhile.

How often an adapter is there when it is asked for follows from how popular each one is (Che's approximation). An entry
stays for about the same time t after its last use, the one at which the cache is just full:

    sum_i s_i (1 - exp(-p_i t)) = budget          hit rate = sum_i p_i (1 - exp(-p_i t))

Source: Che, Tung and Wang (2002), "Hierarchical Web caching systems".
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from labkit.checks import check_whole
from labkit.files.reading import read_header
from labkit.formats.peft_folder import WEIGHTS

RESIDENT, LOADING, FULL = "resident", "loading", "full"


@dataclass
class CacheCounts:
    """What a cache did: uses that found their adapter there, loads, evictions, and loads that failed."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0


class AdapterCache:
    """The adapters of a bank that are in memory, within a budget; any thread may call it.

    Args:
        bank: an `AdapterBank`.
        budget: bytes of factors.
        loader: what runs the loads; by default a thread of its own.

    Attributes:
        counts: since the beginning.
    """

    def __init__(self, bank: Any, budget: int, loader: Executor | None = None):
        check_whole("budget", budget, usual="bytes; 2**28 holds a dozen adapters of rank 16 of a 135M model")
        self.bank, self.budget, self.counts = bank, budget, CacheCounts()
        self.loader = loader or ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")
        self.resident: OrderedDict[Hashable, int] = OrderedDict()  # key → bytes, least recently used first
        self.loading: dict[Hashable, int] = {}
        self.failed: dict[Hashable, Exception] = {}
        self.fresh: set[Hashable] = set()  # loaded, and not used since: who asked for it has not come yet
        self.unwanted: set[Hashable] = set()  # being loaded for nobody
        self.uses: Counter[Hashable] = Counter()
        self.pinned: set[Hashable] = set()
        self.lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Of what is in memory or on its way."""
        with self.lock:
            return sum(self.resident.values()) + sum(self.loading.values())

    def request(self, key: str, path: str | Path) -> str:
        """Have an adapter loaded unless it is there; does not wait.

        Args:
            key: what the bank is to call it; other weights need another key.
            path: its PEFT folder.

        Returns:
            "resident", "loading", or "full": all that would have to leave is in use; ask again later.

        Raises:
            ValueError: it is larger than the budget.
            Exception: its last load failed with this; the next request tries again.
        """
        with self.lock:
            if key in self.failed:
                raise self.failed.pop(key)
            if key in self.resident:
                return RESIDENT
            if key in self.loading:
                self.unwanted.discard(key)
                return LOADING
            size = size_of(path)
            if size > self.budget:
                raise ValueError(
                    f"the adapter in {path} takes {size:,} bytes, and the budget for all is {self.budget:,}; raise it"
                )
            leaving = self.who_leaves(size)
            if leaving is None:
                return FULL
            for one in leaving:
                del self.resident[one]
            self.loading[key] = size
            self.counts.misses += 1
            self.counts.evictions += len(leaving)
        self.loader.submit(self.load, key, path, leaving)
        return self.state(key)

    def state(self, key: str) -> str:
        return RESIDENT if key in self.resident else LOADING

    def who_leaves(self, size: int) -> list | None:
        """The least recently used adapters that make room for `size` bytes; None if all others are needed."""
        missing, leaving = self.nbytes + size - self.budget, []
        for key, nbytes in self.resident.items():
            if missing <= 0:
                break
            if not self.uses[key] and key not in self.pinned and key not in self.fresh:
                leaving.append(key)
                missing -= nbytes
        return leaving if missing <= 0 else None

    def load(self, key: str, path: str | Path, leaving: Sequence[str]) -> None:
        """Unload what leaves, then load; on the loader's thread."""
        try:
            for one in leaving:
                self.bank.unload(one)
            size = self.bank.load(path, key).nbytes
        except Exception as error:  # kept for who asks
            with self.lock:
                del self.loading[key]
                self.unwanted.discard(key)
                self.failed[key] = error
                self.counts.failures += 1
            return
        with self.lock:
            del self.loading[key]
            self.resident[key] = size
            if key not in self.unwanted:
                self.fresh.add(key)
            self.unwanted.discard(key)

    def acquire(self, key: str) -> Any:
        """The adapter, which stays until it is released.

        Raises:
            KeyError: it is not in memory.
        """
        with self.lock:
            if key not in self.resident:
                raise KeyError(f"{key!r} is not in memory; request it, and wait until it is resident")
            self.counts.hits += key not in self.fresh
            self.fresh.discard(key)
            self.resident.move_to_end(key)
            self.uses[key] += 1
            return self.bank.adapter(key)

    def release(self, key: str) -> None:
        """Say that one use is over."""
        with self.lock:
            self.uses[key] -= 1
            if self.uses[key] <= 0:
                del self.uses[key]

    def abandon(self, key: str) -> None:
        """Say that who requested a load no longer waits for it: it may leave like any other."""
        with self.lock:
            self.fresh.discard(key)
            if key in self.loading:
                self.unwanted.add(key)

    def pin(self, key: str, keep: bool = True) -> None:
        """Keep an adapter in memory once it is there; `keep=False` lets it go again."""
        with self.lock:
            if keep:
                self.pinned.add(key)
            else:
                self.pinned.discard(key)

    def close(self) -> None:
        """End the loader's thread, after what it is loading."""
        self.loader.shutdown()


def size_of(path: str | Path) -> int:
    """Bytes that the adapter in a PEFT folder takes in memory, in fp32 at least, by the header of its file.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    header = read_header(Path(path) / WEIGHTS)
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    return sum(prod(tensor["shape"]) * (8 if tensor["dtype"] == "F64" else 4) for tensor in tensors)


def che_hit_rate(
    popularity: Sequence[float] | np.ndarray, budget: float, sizes: Sequence[float] | None = None
) -> float:
    """The share of requests that find their entry in an LRU cache, by Che's approximation.

    Args:
        popularity: how often each entry is asked for, in any unit.
        budget: what the cache holds, in the unit of `sizes`.
        sizes: of the entries; 1 for each if not given, so that the budget is a number of entries.

    >>> zipf = [1 / rank for rank in range(1, 1001)]
    >>> round(che_hit_rate(zipf, 32), 2)
    0.39
    """
    p = np.asarray(popularity, dtype=float)
    p, s = p / p.sum(), np.ones(len(p)) if sizes is None else np.asarray(sizes, dtype=float)
    if budget >= s[p > 0].sum():
        return 1.0
    low, high = 0.0, 1.0
    while (s * -np.expm1(-p * high)).sum() < budget:
        high *= 2
    for _ in range(100):  # bisection, to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if (s * -np.expm1(-p * middle)).sum() < budget else (low, middle)
    return float((p * -np.expm1(-p * high)).sum())
