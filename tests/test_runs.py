"""What a run trains, what it measures, and what its data hash covers."""

import pytest

from labkit.lora.count import trainable
from labkit.quant.linear import QuantLinear
from labkit.sweeps import fitting, runs, tasks
from labkit.sweeps.config import RunConfig

D, LINEARS = 256, 2_949_120  # tiny-llama's width, and the weights of its linear layers


@pytest.mark.parametrize(
    "settings, parameters",
    [
        ({"method": "full"}, 4_000_000),
        ({"method": "full", "embeddings": False}, 4_000_000 - 4096 * D),
        ({"method": "lora", "r": 8}, 149_504),
        ({"method": "lora", "r": 8, "targets": "attention"}, 4 * 8 * (2 * 2 * D + 2 * (D + 128))),
        ({"method": "lora", "r": 8, "embeddings": True}, 149_504 + 4096 * D),
        ({"method": "qlora", "r": 1}, 149_504 // 8),
        ({"method": "subspace", "d": 50}, 50),
        ({"method": "lora", "variant": "dora"}, 149_504 + 4 * (2 * D + 2 * 128 + 2 * 704 + D)),
        ({"method": "ia3"}, 4 * (2 * 128 + 704)),
        ({"method": "prompt", "size": 20}, 20 * D),
        ({"method": "prefix", "size": 146}, 149_504),
        ({"method": "bottleneck", "size": 36}, 8 * (2 * D * 36 + 36 + D)),
        ({"method": "none"}, 0),
    ],
    ids=str,
)
def test_each_method_trains_what_it_says(settings, parameters):
    model, _ = fitting.prepare(RunConfig(**settings))
    assert trainable(model).trainable == parameters
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    assert quantized == (LINEARS if settings["method"] == "qlora" else 0)


def test_the_base_model_scores_as_the_datasheet_says():
    metrics = runs.run(RunConfig(task="austen", method="none")).metrics
    assert metrics["parameters"] == 0
    assert metrics["validation_loss"] == pytest.approx(4.980, abs=5e-3)  # data/austen/README.md
    assert metrics["kjv_loss"] < metrics["test_loss"] > metrics["pydocs_loss"]


def test_training_lowers_the_loss_on_the_new_domain():
    before = runs.run(RunConfig(task="austen", method="none")).metrics
    after = runs.run(RunConfig(task="austen", method="lora", r=4, lr=1e-2, steps=12, batch_size=4)).metrics
    assert after["validation_loss"] < before["validation_loss"] - 0.1
    assert after["test_loss"] < before["test_loss"] - 0.1


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


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "prefix"}, "size goes with prompt, prefix, bottleneck"),
        ({"method": "lora", "size": 8}, "size goes with"),
        ({"method": "prompt", "size": 0}, "size=0 must be a whole number"),
        ({"method": "full", "lora_plus": 16}, "is a rate for LoRA's B"),
        ({"method": "lora", "init": "loftq"}, "it goes with method='qlora'"),
        ({"method": "subspace"}, "d goes with method='subspace'"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_the_hash_covers_what_decides_the_numbers_and_nothing_else():
    base = runs.data_hash(RunConfig(task="facts", examples=8))
    assert base != runs.data_hash(RunConfig(task="facts", examples=9))
    assert base != runs.data_hash(RunConfig(task="facts", examples=8, seed=1)), (
        "facts are drawn from the seed"
    )
    assert base == runs.data_hash(RunConfig(task="facts", examples=8, r=2, lr=1e-2))
    assert runs.data_hash(RunConfig()) == runs.data_hash(RunConfig(seed=1))
    assert runs.data_hash(RunConfig()) != runs.data_hash(RunConfig(model="smollm2-135m"))
    assert len({runs.data_hash(RunConfig(task=task, examples=8)) for task in tasks.TASKS}) == len(tasks.TASKS)
