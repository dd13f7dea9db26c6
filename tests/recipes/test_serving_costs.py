"""The recorded costs of serving: complete, and what the lesson says of them holds in them."""

from itertools import pairwise
from statistics import median

import pytest
import torch

from labkit.models.shapes import config_of, meta_model
from labkit.paths import data_folder
from labkit.serving.costs import Machine, ServedSizes, count_sizes, shared_step
from recipes import jsonl, serving_costs
from recipes.serving_costs import BATCHES, GROUPS, MOST_COPIES, PEFT_DISTINCT, RANK, RESULTS, distinct_up_to

LINES = jsonl.read(data_folder() / RESULTS)
STEPS = {
    (line["model"], line["numbers"], line["batch"], line["distinct"], line["how"]): line["seconds"]
    for line in LINES
    if line["figure"] == "step"
}


def of(figure):
    return [line for line in LINES if line["figure"] == figure]


def seconds(batch, distinct, how, model="smollm2-135m", numbers="fp32"):
    return median(STEPS[model, numbers, batch, distinct, how])


def test_every_group_is_there_with_what_the_numbers_depend_on():
    assert {line["group"] for line in LINES} == set(GROUPS)
    for line in LINES:
        assert line["machine"]["device"] and line["machine"]["threads"] and line["machine"]["torch"]
    for model in ("smollm2-135m", "tiny-llama"):
        for batch in BATCHES:
            for n in distinct_up_to(batch):
                assert len(STEPS[model, "fp32", batch, n, "ours" if n else "base"]) >= 5
                assert (
                    n not in range(1, MOST_COPIES + 1) or len(STEPS[model, "fp32", batch, n, "copies"]) >= 5
                )


def test_sizes_are_what_the_formulas_count():
    for line in of("sizes"):
        bits = 4 if line["numbers"] == "nf4" else None
        sizes = count_sizes(meta_model(config_of(line["model"]), dtype=torch.float32), RANK, bits=bits)
        assert sizes == ServedSizes(**{name: line[name] for name in vars(sizes)})


@pytest.mark.parametrize("model", ["smollm2-135m", "tiny-llama"])
def test_a_mixed_batch_is_never_slower_than_pefts(model):
    for n in PEFT_DISTINCT:
        assert seconds(16, n, "ours", model) < seconds(16, n, "PEFT", model)


def test_sharing_beats_copies_from_two_adapters_on_while_few_rows_are_decoded():
    for batch in (8, 16):
        for n in distinct_up_to(batch)[2:]:
            assert seconds(batch, n, "ours") < seconds(batch, n, "copies")
        assert seconds(batch, 1, "copies") < seconds(batch, 1, "ours"), "one adapter alone is best merged"


def test_what_adapters_add_is_near_what_the_roofline_says():
    (machine,) = of("machine")
    best = Machine(1e9 * max(machine["GB_per_s"]), 1e9 * max(machine["GFLOP_per_s"]))
    sizes = count_sizes(meta_model(config_of("smollm2-135m"), dtype=torch.float32), RANK)
    for n in PEFT_DISTINCT:
        predicted = shared_step(sizes, best, 16, n) / shared_step(sizes, best, 16, 0)
        measured = seconds(16, n, "ours") / seconds(16, 0, "base")
        assert measured < 1.25 * predicted


def test_a_swap_takes_less_than_a_millisecond_and_a_wrap_leaves_its_adapter_behind():
    swap = {line["how"]: median(line["seconds"]) for line in of("swap")}
    assert swap["AdapterBank.rows"] < 1e-3
    wrap = {line["how"]: line for line in of("wrap")}
    left = wrap["PEFT from_pretrained"]["bytes_left"]
    adapter = count_sizes(meta_model(config_of("smollm2-135m"), dtype=torch.float32), RANK).adapter_bytes
    assert [after - before for before, after in pairwise(left)] == [adapter] * (len(left) - 1)


def test_work_takes_turns_and_the_first_lap_warms_up():
    calls = []
    found = serving_costs.in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, 4)
    laps = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(lap) == ["a", "b", "c"] for lap in laps) and len(set(map(tuple, laps))) > 1
    assert all(len(taken) == 4 for taken in found.values())
