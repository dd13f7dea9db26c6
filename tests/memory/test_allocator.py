"""CUDA's caching allocator as a model: its rules one by one, and whole steps played to it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.memory.allocator import MIB, CachingAllocator, block_bytes, replay
from labkit.memory.formulas import plan
from labkit.memory.setup import setup_of
from labkit.memory.simulation import record_step
from labkit.models.shapes import config_of
from tests.memory.conftest import close


def test_sizes_are_rounded_up_to_512_bytes():
    allocator = CachingAllocator()
    assert [allocator.take(n).size for n in (1, 512, 513)] == [512, 512, 1024]
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (1026, 2048, 2 * MIB)


@pytest.mark.parametrize(
    ("size", "segment"), [(MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (10 * MIB + 1, 12)]
)
def test_a_tensor_gets_a_segment_of_the_right_size(size, segment):
    allocator = CachingAllocator()
    allocator.take(size)
    assert allocator.reserved == segment * MIB


def test_up_to_a_mebibyte_is_not_cut_off_a_large_block():
    assert CachingAllocator().take(11 * MIB).size == 12 * MIB == block_bytes(11 * MIB)
    assert CachingAllocator().take(11 * MIB - 1024).size == 11 * MIB - 1024 == block_bytes(11 * MIB - 1024)
    allocator = CachingAllocator()
    allocator.give_back(allocator.take(3 * MIB))
    assert allocator.take(19 * MIB).size == 20 * MIB, "of a segment that is there, too"


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.take(n * MIB) for n in (40, 30, 20)]
    for block in blocks:
        allocator.give_back(block)
    assert allocator.take(25 * MIB) is blocks[1]
    assert allocator.reserved == 90 * MIB


def test_neighbours_that_are_free_are_joined():
    allocator = CachingAllocator()
    whole = allocator.take(60 * MIB)
    allocator.give_back(whole)
    parts = [allocator.take(20 * MIB) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.give_back(part)
    assert allocator.take(60 * MIB).size == allocator.reserved == 60 * MIB


def test_what_is_between_tensors_is_reserved_and_of_no_use_to_a_larger_one():
    allocator = CachingAllocator()
    allocator.give_back(allocator.take(60 * MIB))
    first, _ = allocator.take(20 * MIB), allocator.take(20 * MIB)
    allocator.give_back(first)
    assert allocator.reserved - allocator.allocated == 40 * MIB
    allocator.take(30 * MIB)
    assert allocator.reserved == 90 * MIB, "there are 40 MiB free, in two pieces"


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_blocks_add_up(seed):
    rng, allocator, live = random.Random(seed), CachingAllocator(), []
    for _ in range(120):
        if live and rng.random() < 0.45:
            allocator.give_back(live.pop(rng.randrange(len(live))))
        else:
            live.append(allocator.take(rng.choice((100, 5000, MIB, 3 * MIB, 15 * MIB)) * rng.randint(1, 3)))
        free = sum(size for pool in allocator.pools.values() for size, _, _ in pool)
        assert allocator.allocated == sum(block.size for block in live)
        assert allocator.requested == sum(block.requested for block in live) <= allocator.allocated
        assert allocator.allocated + free == allocator.reserved == allocator.peak_reserved
    for block in live:
        allocator.give_back(block)
    assert allocator.allocated == allocator.requested == 0
    free = [block for pool in allocator.pools.values() for _, _, block in pool]
    assert all(block.before is block.after is None for block in free), "every segment is whole again"


@pytest.mark.parametrize(("method", "checkpointing"), [("qlora", True), ("qlora", False), ("full", False)])
def test_a_plan_for_a_card_is_within_2_percent_of_the_blocks_of_a_simulated_step(method, checkpointing):
    config = config_of("llama-2-7b")
    config.num_hidden_layers = 3
    how = dict(checkpointing=checkpointing, max_length=512)
    record = record_step(config, setup_of(method, how))
    allocator = replay(record)
    assert allocator.peak_requested == record.peak()[0]
    assert close(plan(config, method, **how).peak, allocator.peak_allocated, 0.02)
    assert allocator.peak_requested <= allocator.peak_allocated <= allocator.peak_reserved
    assert allocator.peak_reserved < 1.25 * allocator.peak_allocated
