"""What serving costs by the formulas: sizes are counted, and every function is its closed form."""

import math

import pytest
import torch

import labkit
from labkit import models
from labkit.lora.inject import lora_layers
from labkit.models.shapes import config_of, meta_model
from labkit.quant.model import quantize_model
from labkit.serving.costs import (
    Machine,
    ServedSizes,
    adapters_that_fit,
    boundary_batch,
    break_even_memory,
    break_even_time,
    calls_of,
    copies_bytes,
    copies_step,
    copies_that_fit,
    count_sizes,
    deal,
    distinct_adapters,
    gain_of_sharing,
    merge_seconds,
    shared_bytes,
    shared_step,
    zipf,
)

# W = 1000 bytes and P = 250 parameters in fp32; an adapter is a twentieth of both
SIZES = ServedSizes(1000, 1200, 250, 900, 225, 50, 12, layers=7)
MACHINE = Machine(bandwidth=1000.0, flops=5000.0, call=0.001)


def sizes_of(name, dtype=torch.float32, **options):
    return count_sizes(meta_model(config_of(name), dtype=dtype), **options)


def test_smollm2_at_rank_16_is_what_one_counts_by_hand():
    sizes = sizes_of("smollm2-135m")
    hidden, inner, kv, blocks, vocabulary = 576, 1536, 192, 30, 49152
    linear = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    norms = 2 * blocks * hidden + hidden
    assert sizes.adapted_parameters == blocks * linear
    assert sizes.parameters == blocks * linear + vocabulary * hidden
    assert sizes.base_bytes == sizes.resident_bytes == 4 * (sizes.parameters + norms)
    assert sizes.adapter_parameters == 16 * 305_280 and sizes.layers == 7 * blocks
    assert sizes.share == pytest.approx(0.036, abs=5e-4)
    # four bits make adapters dear: the base shrinks, and they do not
    assert sizes_of("smollm2-135m", bits=4).share == pytest.approx(0.116, abs=2e-3)
    assert sizes_of("llama-2-7b", torch.float16, adapter_bits=16).share == pytest.approx(0.006, abs=5e-4)


def test_sizes_of_a_real_model_are_those_of_its_tensors(tmp_path):
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    resident = sum(p.nbytes for p in model.parameters())
    by_formula, plain = count_sizes(model, bits=4), count_sizes(model)
    assert plain.resident_bytes == resident
    quantize_model(model, "nf4")
    in_four = count_sizes(model)
    assert in_four == by_formula
    assert in_four.parameters == plain.parameters and in_four.resident_bytes < 0.5 * resident
    labkit.add_lora(model, labkit.LoRAConfig(r=16))
    factors = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    assert plain.adapter_bytes == sum(p.nbytes for p in factors)
    assert plain.layers == len(lora_layers(model))


def test_an_embedding_that_is_only_looked_up_is_held_and_not_read():
    sizes = sizes_of("llama-2-7b", torch.float16)  # its output layer has a weight of its own
    assert sizes.resident_bytes - sizes.base_bytes == 2 * 32_000 * 4096


def test_a_step_is_the_larger_of_reading_and_arithmetic_and_the_calls():
    assert shared_step(SIZES, MACHINE, 1, 0) == 1000 / 1000
    assert shared_step(SIZES, MACHINE, 1, 4) == pytest.approx(1200 / 1000)
    assert shared_step(SIZES, MACHINE, 100, 0) == 2 * 100 * 250 / 5000
    assert shared_step(SIZES, MACHINE, 100, 1) == shared_step(SIZES, MACHINE, 100, 4) == 2 * 100 * 262 / 5000
    calls = calls_of(SIZES, 4, "loop")
    assert calls == 5 * 4 * 7 and shared_step(SIZES, MACHINE, 1, 4, calls) == pytest.approx(1.2 + 0.14)
    assert calls_of(SIZES, 4, "segments") == 2 * 4 * 7
    assert calls_of(SIZES, 4, "one for all") == calls_of(SIZES, 1, "one for all") == 7
    assert calls_of(SIZES, 0, "one for all") == 0


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_where_reading_decides_copies_take_n_over_1_plus_n_times_the_share_as_long(n):
    ratio = copies_step(SIZES, MACHINE, [0.1] * n) / shared_step(SIZES, MACHINE, 0.1 * n, n)
    assert ratio == pytest.approx(gain_of_sharing(SIZES, n)) == n / (1 + n * 0.05)
    assert gain_of_sharing(SIZES, 1e9) == pytest.approx(1 / SIZES.share)


def test_where_arithmetic_decides_copies_win_by_the_adapters_share_of_it():
    ratio = copies_step(SIZES, MACHINE, deal(4000, 4)) / shared_step(SIZES, MACHINE, 4000, 4)
    assert ratio == pytest.approx(1 / (1 + 12 / 250))
    assert break_even_time(SIZES, Machine(1000.0, 5000.0), 4000) > 4000 / 10


def test_the_boundary_is_where_reading_and_arithmetic_take_as_long():
    b = boundary_batch(SIZES, MACHINE)
    assert b == 5000 * 1000 / (2 * 250 * 1000)
    assert 2 * b * 250 / 5000 == pytest.approx(1000 / 1000)
    assert boundary_batch(SIZES, Machine(2000.0, 5000.0)) == b / 2


def test_break_even_in_time_is_two_while_reading_decides_and_never_where_arithmetic_does():
    free = Machine(1000.0, 5000.0)
    assert break_even_time(SIZES, free, 8) == 2
    assert break_even_time(SIZES, free, 1) is None, "one row uses one adapter, and a merged copy answers it"
    slow = Machine(1000.0, 5000.0, call=1.0)
    assert break_even_time(SIZES, slow, 8) is None
    assert break_even_time(SIZES, slow, 8, memory=3 * 1200) == 4, "when a fourth copy does not fit"
    # up to four copies have b* = 10 rows or more each and waste nothing; of six, each waits for memory
    assert break_even_time(SIZES, free, 48) == 6


def test_break_even_in_memory():
    n = break_even_memory(SIZES)
    assert n == 2
    assert shared_bytes(SIZES, n) < copies_bytes(SIZES, n) and shared_bytes(SIZES, 1) > copies_bytes(SIZES, 1)
    large = ServedSizes(1000, 1200, 250, 900, 225, 900, 225, layers=7)
    assert break_even_memory(large) == 5  # 1200 + 5 * 900 < 5 * 1200, and at 4 they are equal
    assert break_even_memory(ServedSizes(1000, 1200, 250, 900, 225, 1300, 325, layers=7)) is None
    assert copies_that_fit(SIZES, 5000) == 4 and adapters_that_fit(SIZES, 5000) == 76
    assert adapters_that_fit(SIZES, 1000) == 0 and copies_that_fit(SIZES, math.inf) == math.inf


def test_merging_reads_and_writes_the_adapted_weights():
    assert merge_seconds(SIZES, MACHINE, 1) == 2 * 900 / 1000
    assert merge_seconds(SIZES, MACHINE, 100) == 2 * 100 * 225 / 5000


@pytest.mark.parametrize(
    ("skew", "expected"), [(0, (7.7, 14.9, 47.4)), (1, (6.7, 11.7, 31.4)), (1.5, (4.9, 7.7, 18.1))]
)
def test_distinct_adapters_in_a_batch_are_as_many_as_drawing_finds(skew, expected):
    popularity = zipf(100, skew)
    assert popularity.sum() == pytest.approx(1)
    draw = torch.Generator().manual_seed(0)
    for batch, value in zip((8, 16, 64), expected):
        formula = distinct_adapters(popularity, batch)
        assert formula == pytest.approx(value, abs=0.06)
        drawn = torch.multinomial(
            torch.tensor(popularity).expand(2000, -1), batch, replacement=True, generator=draw
        )
        assert sum(len(row.unique()) for row in drawn) / 2000 == pytest.approx(formula, abs=0.2)
    assert distinct_adapters(popularity * 7, 1) == pytest.approx(1)


def test_what_is_not_a_number_of_rows_or_a_machine_is_refused():
    with pytest.raises(ValueError, match="bandwidth=0 must be a positive number"):
        Machine(0, 1e9)
    with pytest.raises(ValueError, match="batch=0"):
        shared_step(SIZES, MACHINE, 0, 1)
    with pytest.raises(ValueError, match="bits=8 is not known"):
        count_sizes(torch.nn.Linear(2, 2), bits=8)
    with pytest.raises(ValueError, match="how='gather' is not known"):
        calls_of(SIZES, 1, "gather")
