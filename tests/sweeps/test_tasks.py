"""Each task is judged by a metric that a wrong answer lowers."""

import pytest

from labkit.data.tickets import load_tickets, ticket_answer
from labkit.sweeps import runs, tasks
from labkit.sweeps.config import TASK_NAMES, RunConfig
from labkit.sweeps.tasks import TASKS


def test_the_base_model_scores_as_the_datasheet_says():
    metrics = runs.run(RunConfig(task="austen", method="none")).metrics
    assert metrics["parameters"] == 0
    assert metrics["validation_loss"] == pytest.approx(4.980, abs=5e-3)  # data/austen/README.md
    assert metrics["kjv_loss"] < metrics["test_loss"] > metrics["pydocs_loss"]


def test_sql_is_judged_by_execution(monkeypatch):
    def gold_from_prompt(model, tokenizer, prompts, *_, **__):
        by_question = {item["question"]: item["query"] for item in tasks.sql.load_questions("test")}
        answers = [by_question[prompt.strip().splitlines()[-1]] for prompt in prompts]
        return ["SELECT nothing", *answers[1:]]

    monkeypatch.setattr(tasks, "generate", gold_from_prompt)
    metrics = runs.run(RunConfig(task="sql", method="none")).metrics
    assert metrics["execution"] == metrics["exact_match"] == 199 / 200


def test_docstrings_are_judged_by_the_letter():
    metrics = runs.run(RunConfig(task="docstrings", method="none")).metrics
    assert 0 <= metrics["test_accuracy"] < 0.25, "eight letters that it was never told"


def test_tickets_are_judged_field_by_field_and_the_wrong_ones_are_kept(monkeypatch):
    few = {split: load_tickets(split)[:4] for split in ("train", "validation", "test")}
    monkeypatch.setattr(tasks, "load_tickets", few.__getitem__)

    def gold_but_for_one_urgency(model, tokenizer, prompts, *_, **__):
        answers = [ticket_answer(ticket["label"]) for ticket in few["test"]]
        other = "low" if few["test"][2]["label"]["urgency"] != "low" else "high"
        return [*answers[:2], ticket_answer(few["test"][2]["label"] | {"urgency": other}), answers[3]]

    monkeypatch.setattr(tasks, "generate", gold_but_for_one_urgency)
    result = runs.run(RunConfig(task="tickets", model="smollm2-135m", method="none"))
    assert result.wrong == [2] and result.metrics["exact_match"] == 0.75
    assert result.metrics["urgency"] == 0.75 and result.metrics["order"] == 1
    assert "peak_bytes" not in result.metrics and result.metrics["test_loss"] > 1
    alone = runs.run(RunConfig(task="tickets_loss", model="smollm2-135m", method="none")).metrics
    assert alone["validation_loss"] == result.metrics["validation_loss"], "the same loss, and no answers"
    assert "exact_match" not in alone


def test_varied_tickets_are_as_many_as_a_run_sees_and_the_first_are_the_originals():
    n = len(load_tickets("train"))
    config = RunConfig(task="tickets_varied", model="smollm2-135m", batch_size=4, steps=n // 2)
    records = TASKS["tickets_varied"].records(config)
    assert len(records) == 2 * n and records[:n] == tasks.ticket_records(config)
    assert sum(old == new for old, new in zip(records[:n], records[n:])) < 0.01 * n


@pytest.mark.slow
def test_a_run_of_the_task_spectra_records_numbers_with_their_controls(monkeypatch):
    few = {split: tasks.load_austen(split)[:8] for split in ("train", "validation")}
    monkeypatch.setattr(tasks, "load_austen", few.__getitem__)
    metrics = runs.run(RunConfig(task="spectra", r=4, lr=1e-2, steps=4, batch_size=4)).metrics
    assert metrics["energy90"] <= 4 / 128 < metrics["energy90_control"]
    assert metrics["kept_4"] == pytest.approx(1, abs=1e-3)
    assert metrics["phi8_out"] > metrics["phi8_out_control"]


def test_the_names_of_tasks_that_a_config_takes_are_the_tasks():
    assert tuple(TASKS) == TASK_NAMES
