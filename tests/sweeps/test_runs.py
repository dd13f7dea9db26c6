"""A run learns something, and its hash covers the data that its numbers rest on."""

import pytest

from labkit.sweeps import runs, tasks
from labkit.sweeps.config import RunConfig


@pytest.mark.slow
def test_training_lowers_the_loss_on_the_new_domain():
    before = runs.run(RunConfig(task="austen", method="none")).metrics
    after = runs.run(RunConfig(task="austen", method="lora", r=4, lr=1e-2, steps=12, batch_size=4)).metrics
    assert after["validation_loss"] < before["validation_loss"] - 0.1
    assert after["test_loss"] < before["test_loss"] - 0.1


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
