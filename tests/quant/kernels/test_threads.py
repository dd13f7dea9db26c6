"""Kernels on many threads, from many threads, in forked processes, and without the interpreter lock."""

import os
import threading
import time

import numba
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from labkit.quant.codebooks import nf4
from labkit.quant.kernels import operations, tasks, threads
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.kernels.vectors import next_part, pointer
from labkit.quant.tensor import quantize
from tests.quant.cases import (
    LARGE,
    reference,
)


@pytest.mark.parametrize("n", [LARGE, LARGE + 1, LARGE + 63, LARGE + 64 * 3 + 7])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_reference_bits(n, threads, threading_by):
    before = torch.get_num_threads()
    flat = torch.randn(n)
    packed, absmax, values = reference(flat)
    torch.set_num_threads(threads)
    try:
        got = operations.quantize_4bit(flat, nf4(), 64)
        back = operations.dequantize_4bit(PackedWeight(packed, absmax, nf4(), 64), n)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], packed) and torch.equal(got[1], absmax) and torch.equal(back, values)


@numba.cfunc(tasks.TASK)
def _record(arguments):
    """A task that counts, from the address a[2] on, how often each part was taken."""
    a = numba.carray(arguments, 32)
    part = next_part(a)
    while part < a[1]:
        counts = numba.carray(pointer(a[2]), a[1], np.int64)
        counts[part] += 1
        part = next_part(a)


@pytest.mark.parametrize(
    ("number", "n", "parts"),
    [
        (1, LARGE, 1),
        (3, LARGE - 1, 1),
        (3, LARGE, 3),
        (3, 5 * threads.PART, 5),
        (3, 99 * threads.PART, 12),
        (64, LARGE, 16),
    ],
)
def test_work_is_cut_into_parts_that_are_taken_once_each(number, n, parts, threading_by):
    before = torch.get_num_threads()
    counts = np.zeros(parts + 1, np.int64)
    torch.set_num_threads(number)
    try:
        threads.run(_record.address, 16 if number == 64 else n // 64, n, counts.ctypes.data)
    finally:
        torch.set_num_threads(before)
    assert counts.tolist() == [1] * parts + [0]


def test_four_threads_at_once_get_their_own_results(two_threads, threading_by):
    weights = [torch.randn(1024, 1024) * (i + 1) for i in range(4)]
    expected = [quantize(w) for w in weights]
    failures = []

    def work(i):
        for _ in range(20):
            q = quantize(weights[i])
            if not torch.equal(q.packed, expected[i].packed) or not torch.equal(q.dequantize(), values[i]):
                failures.append(i)

    values = [q.dequantize() for q in expected]
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


class QuantizedItems(Dataset):
    """Quantizes in the worker process, with two threads of its own.

    The input is made by numpy: PyTorch's own parallel operations hang in a forked process with more than one
    thread.
    """

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.set_num_threads(2)
        flat = torch.from_numpy(np.sin(np.arange(LARGE, dtype=np.float32)) * np.float32(i + 1))
        return operations.dequantize_4bit(
            PackedWeight(*operations.quantize_4bit(flat, nf4(), 64), nf4(), 64), LARGE
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_dataloader_workers_dequantize_although_the_parent_has_threads(two_threads, threading_by):
    items = QuantizedItems()
    expected = [items[i] for i in range(4)]  # the parent has threads now, which its children will not
    assert threading_by == "openmp" or threads._pool is not None
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


def test_kernels_release_the_interpreter_lock():
    flat = torch.randn(1 << 22)
    operations.quantize_4bit(flat, nf4(), 64)  # compiled
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    other = threading.Thread(target=tick)
    other.start()
    try:
        start = time.perf_counter()
        for _ in range(5):
            operations.quantize_4bit(flat, nf4(), 64)
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
        torch.set_num_threads(before)
    assert sum(start < t < end for t in ticks) > 5  # with the lock held, one a call at most
