"""The adapters in memory: bytes are kept to, what is in use stays, and the hit rate is what Che's formula says."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from labkit.serving.adapter_cache import AdapterCache, che_hit_rate, size_of
from tests.serving.engines import AtOnce


class FakeBank:
    """Loads adapters of as many bytes as their folder's weights, and notes which are there."""

    def __init__(self, gate=None):
        self.there, self.gate, self.most = {}, gate, 0

    def load(self, path, key):
        if self.gate is not None:
            assert self.gate.wait(20)
        if path.name == "broken":
            raise ValueError("it is broken")
        self.there[key] = SimpleNamespace(name=key, nbytes=size_of(path))
        self.most = max(self.most, sum(one.nbytes for one in self.there.values()))
        return self.there[key]

    def unload(self, key):
        del self.there[key]

    def adapter(self, key):
        return self.there[key]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder with an adapter of so many bytes in memory."""
    root = tmp_path_factory.mktemp("sizes")

    def folder_of(size, name=None, dtype=torch.float32):
        folder = root / (name or f"{size}-{dtype}")
        if not folder.exists():
            folder.mkdir()
            save_file({"A": torch.zeros(size // 4, dtype=dtype)}, folder / "adapter_model.safetensors")
        return folder

    return folder_of


def use(cache, key, path):
    assert cache.request(key, path) == "resident"
    cache.acquire(key)
    cache.release(key)


def test_zipf_traffic_over_1000_adapters_hits_as_often_as_che_says(folder_of):
    bank, draw = FakeBank(), random.Random(0)
    cache = AdapterCache(bank, budget=32 * 400, loader=AtOnce())
    weights = [1 / rank for rank in range(1, 1001)]
    expected = che_hit_rate(weights, 32)
    assert abs(expected - 0.39) < 0.005
    names = draw.choices(range(1000), weights, k=8_000)
    for name in names[:2000]:
        use(cache, str(name), folder_of(400))
    before = cache.counts.hits
    for name in names[2000:]:
        use(cache, str(name), folder_of(400))
    assert abs((cache.counts.hits - before) / 6_000 - expected) < 0.03
    assert cache.counts.hits + cache.counts.misses == 8_000
    assert len(bank.there) == 32 and bank.most == 32 * 400


def test_the_formula_counts_bytes_where_sizes_differ():
    sizes, weights, draw = [1, 9] * 200, [1 / rank for rank in range(1, 401)], random.Random(1)
    cache, held, hits = {}, 0, 0
    names = draw.choices(range(400), weights, k=8_000)
    for i, name in enumerate(names):
        hits += name in cache and i >= 2000
        held += 0 if name in cache else sizes[name]
        cache[name] = cache.pop(name, None)
        while held > 200:
            oldest = next(iter(cache))
            del cache[oldest]
            held -= sizes[oldest]
    assert abs(hits / 6_000 - che_hit_rate(weights, 200, sizes)) < 0.03
    assert che_hit_rate([1, 1], 2) == che_hit_rate([3, 1, 0], 2) == 1


def test_bytes_are_kept_to_and_the_least_recently_used_leaves(folder_of):
    bank = FakeBank()
    cache = AdapterCache(bank, budget=1000, loader=AtOnce())
    for key, size in (("a", 400), ("b", 400), ("a", 400), ("c", 200), ("d", 240)):
        use(cache, key, folder_of(size))
    assert set(bank.there) == {"a", "c", "d"} and cache.nbytes == 840 and bank.most <= 1000
    use(cache, "e", folder_of(900))
    assert set(bank.there) == {"e"} and cache.counts.evictions == 4
    with pytest.raises(ValueError, match="takes 1,200 bytes, and the budget for all is 1,000"):
        cache.request("f", folder_of(1200))


def test_what_is_in_use_or_pinned_stays(folder_of):
    bank = FakeBank()
    cache = AdapterCache(bank, budget=1000, loader=AtOnce())
    for key in "ab":
        assert cache.request(key, folder_of(400)) == "resident"
    cache.acquire("a")
    cache.acquire("a")
    cache.pin("b")
    use(cache, "b", folder_of(400))
    assert cache.request("c", folder_of(400)) == "full"
    cache.release("a")
    assert cache.request("c", folder_of(400)) == "full"
    cache.release("a")
    assert cache.request("c", folder_of(400)) == "resident" and set(bank.there) == {"b", "c"}
    cache.pin("b", keep=False)
    # c was loaded for somebody who has not used it yet
    assert cache.request("d", folder_of(800)) == "full"
    cache.abandon("c")
    assert cache.request("d", folder_of(800)) == "resident" and set(bank.there) == {"d"}


def test_a_load_happens_on_another_thread_once_and_nobody_waits_for_it(folder_of):
    gate = threading.Event()
    bank, loader = FakeBank(gate), ThreadPoolExecutor(1)
    cache = AdapterCache(bank, budget=1000, loader=loader)
    assert cache.request("a", folder_of(400)) == cache.request("a", folder_of(400)) == "loading"
    assert cache.nbytes == 400, "what is on its way counts"
    with pytest.raises(KeyError, match="not in memory"):
        cache.acquire("a")
    gate.set()
    cache.close()
    assert cache.request("a", folder_of(400)) == "resident" and cache.counts.misses == 1


def test_what_is_loaded_for_nobody_may_leave(folder_of):
    gate, loader = threading.Event(), ThreadPoolExecutor(1)
    cache = AdapterCache(FakeBank(gate), budget=1000, loader=loader)
    for key in "ab":
        assert cache.request(key, folder_of(400)) == "loading"
        cache.abandon(key)
    assert cache.request("b", folder_of(400)) == "loading", "and b is wanted again"
    gate.set()
    loader.submit(int).result(20)
    assert cache.request("c", folder_of(800)) == "full"
    assert cache.request("c", folder_of(600)) != "full"
    cache.close()
    assert list(cache.resident) == ["b", "c"]


def test_a_failed_load_is_told_once_and_then_tried_again(folder_of):
    cache = AdapterCache(FakeBank(), budget=1000, loader=AtOnce())
    broken = folder_of(400, "broken")
    for _ in range(2):
        assert cache.request("a", broken) == "loading"
        with pytest.raises(ValueError, match="it is broken"):
            cache.request("a", broken)
    assert cache.nbytes == 0 and cache.counts.failures == 2


def test_sixteen_bit_files_are_counted_as_they_are_in_memory(folder_of):
    assert size_of(folder_of(400, "half", torch.bfloat16)) == 400
