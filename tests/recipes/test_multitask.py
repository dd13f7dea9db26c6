"""Five tasks and their edge cases: nothing leaks, and an exact match is what greedy decoding writes."""

import json
import math

import pytest

from labkit.data.own.leaks import find_leaks
from labkit.data.passages import DOCUMENT_START
from labkit.doctor.specimens import tiny_llama, trained
from labkit.lab.figures import multitask as reader
from labkit.training.evaluate import generate, held_out_loss
from recipes import multitask

MAKERS = {
    make.__name__: make
    for make in (
        multitask.orders,
        multitask.sql,
        multitask.docstrings,
        multitask.ingredients,
        multitask.prose,
    )
}


@pytest.mark.parametrize("task", multitask.TASKS)
def test_no_record_is_in_two_sets_and_no_edge_case_is_like_one_of_training(task):
    sets = MAKERS[task]()
    texts = [r["prompt"] + r["completion"] for records in sets.values() for r in records]
    assert len(set(texts)) == len(texts) == multitask.TRAIN + sum(multitask.ASKED.values())
    assert not find_leaks(sets["train"], sets["near"])


def test_edge_cases_have_what_no_other_record_has():
    def others(sets):
        return [r for which in ("train", "dev", "held") for r in sets[which]]

    def quantity_first(record):
        quantity = json.loads(record["completion"])["quantity"]
        return bool(quantity) and record["prompt"].startswith(DOCUMENT_START + quantity)

    sets = multitask.ingredients()
    assert all(map(quantity_first, others(sets))) and not any(map(quantity_first, sets["near"]))
    for make, feature in (
        (multitask.docstrings, lambda r: r["module"]),
        (multitask.sql, lambda r: r["prompt"].splitlines()[0]),
        (multitask.prose, lambda r: r["novel"]),
    ):
        sets = make()
        assert not {feature(r) for r in others(sets)} & {feature(r) for r in sets["near"]}


def test_every_arm_but_the_single_ones_sees_what_all_of_those_see_together():
    def seen(arm, task):
        return [row.tobytes() for b in multitask.batches(arm, task, 0) for row in b.targets.numpy()]

    single = [one for task in multitask.TASKS for one in seen("single", task)]
    assert sorted(seen("multi", "all")) == sorted(single) == sorted(seen("full", "all"))
    assert len(seen("thrown", "all")) == len(single)


@pytest.mark.slow
def test_loss_and_exact_match_are_those_of_the_evaluation_and_of_greedy_decoding():
    model, tokenizer = trained(0)[0], tiny_llama()[1]
    records = multitask.orders()["held"][:20]
    loss, exact = multitask.ask(model, [multitask.encode(r, tokenizer) for r in records])
    said = generate(model, tokenizer, [r["prompt"] for r in records], max_new_tokens=24, progress=False)
    assert (
        exact == sum(a.strip() == r["completion"].strip() for a, r in zip(said, records)) / len(records) > 0
    )
    assert loss == pytest.approx(held_out_loss(model, tokenizer, records)[0], rel=1e-4)


def test_a_walk_goes_on_until_the_best_rate_lies_between_worse_ones(tmp_path, monkeypatch):
    def measured(arm, task, lr, seed):
        loss = 4.0 if arm == "base" else abs(math.log2(lr / 5e-4)) + 1
        sets = {"dev": {"loss": loss}}
        return {
            "arm": arm,
            "task": task,
            "lr": lr,
            "seed": seed,
            "measured": dict.fromkeys(multitask.TASKS, sets),
            "processor_seconds": 0,
        }

    monkeypatch.setattr(multitask, "measure", measured)
    runs = multitask.Runs(tmp_path / "lines.jsonl")
    assert runs.best_rate("multi", "all") == 5e-4
    tried = sorted(lr for arm, _, lr, _ in runs.lines if arm == "multi")
    assert tried == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert multitask.Runs(tmp_path / "lines.jsonl").lines == runs.lines


def test_recorded_runs_are_on_the_data_as_they_are_now_and_bracketed():
    lines = reader.load_multitask()
    assert {line["data"] for line in lines} == {multitask.data_hash()}
    assert reader.tasks_of(lines) == list(multitask.TASKS)
    rates = reader.best_rates(lines)
    main = [key for key in rates if key[0] != "thrown"]  # which comes last
    assert {arm for arm, _ in main} == {"single", "multi", "wide", "full"}
    for arm, task in main:
        seeds = reader.at_best(lines, arm, multitask.TASKS[0] if task == "all" else task)
        assert not rates[arm, task].at_edge and len(seeds) >= 3
