"""Settings of a run: each out of its range or of the wrong type is named; the schedules are the formulas."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from labkit.training.config import TrainConfig, learning_rate


def test_schedules():
    def rates(**c):
        return [learning_rate(s, 10, TrainConfig(lr=1.0, **c)) for s in range(10)]

    assert rates(schedule="constant", warmup=0) == [1.0] * 10
    assert rates(schedule="linear", warmup=0.2) == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cosine = rates(schedule="cosine", warmup=0)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)])


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0}, {"lr": float("nan")}, {"steps": 0}, {"batch_size": -1}, {"schedule": "step"}, {"warmup": 1}, {"clip": 0},
     {"logits": "some"}, {"patience": 2}],
)  # fmt: skip
def test_config_out_of_range_says_which(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": "1e-3"}, "lr='1e-3' must be a positive number"),
        ({"lr": True}, "lr=True must be a positive number"),
        ({"lr": float("inf")}, "lr=inf must be a positive number"),
        ({"lora_plus": "16"}, "lora_plus='16' must be a positive number"),
        ({"epochs": None}, "epochs=None must be a positive number"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number of at least 1"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"steps": float("nan")}, "steps=nan must be a whole number"),
        ({"batch_size": "8"}, "batch_size='8' must be a whole number"),
        ({"batch_size": 8.0}, "batch_size=8.0 must be a whole number"),
        ({"accumulation": 1.5}, "accumulation=1.5 must be a whole number"),
        ({"max_length": None}, "max_length=None must be a whole number"),
        ({"checkpoint_every": 0.5}, "checkpoint_every=0.5 must be a whole number"),
        ({"eval_every": "10"}, "eval_every='10' must be a whole number"),
        ({"patience": 1.0, "eval_every": 1}, "patience=1.0 must be a whole number"),
        ({"state_budget_bytes": 1e6}, "state_budget_bytes=1000000.0 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"clip": "1"}, "clip='1' must be a positive number; None is for no clipping"),
        (
            {"warmup": "0.1"},
            "warmup='0.1' must be a number of at least 0 and below 1; it is a share of the steps",
        ),
        ({"warmup": float("nan")}, "warmup=nan must be a number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a number of at least 0"),
        ({"eps": float("inf")}, "eps=inf must be a number of at least 0"),
        ({"betas": (0.9, 1.0)}, "betas=1.0 must be a number of at least 0 and below 1"),
        ({"betas": 0.9}, r"betas=0.9 must be two numbers, such as \(0.9, 0.999\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers"),
        ({"schedule": "cosin"}, "schedule='cosin' is not known; .*; did you mean 'cosine'"),
        ({"optimizer": None}, "optimizer=None is not known; choose one of"),
        ({"checkpointing": "no"}, "checkpointing='no' is not known; choose one of"),
        ({"progress": 1}, "progress=1 is not known; choose one of"),
        ({"checkpoint_folder": 3}, "checkpoint_folder=3 must be a path, or None"),
        ({"checkpoint_folder": ""}, "checkpoint_folder='' must be a path, or None"),
        ({"lr": 10**400}, r"lr=10+ must be a positive number"),
        ({"steps": 10**400}, "steps=10+ must be a number of at least 0 and below 1000000000000"),
        ({"epochs": 1e308}, r"epochs=1e\+308 must be a number of at least 0 and below"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be a number of at least 0 and below 4294967296"),
        ({"betas": ("0.9", 0.999)}, "betas='0.9' must be a number of at least 0 and below 1"),
        ({"patience": 2}, "patience counts evaluations: give eval_every too"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_said_with_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_numbers_of_numpy_are_taken_as_pythons_and_fit_into_json():
    given = {"lr": np.float32(0.5), "steps": np.int64(3), "betas": np.array([0.5, 0.75])}
    config = TrainConfig(**given | {"betas": list(given["betas"])})
    assert (config.lr, config.steps, config.betas) == (0.5, 3, (0.5, 0.75))
    assert json.loads(json.dumps(asdict(config)))["betas"] == [0.5, 0.75]


def test_values_at_the_edge_of_what_is_allowed_are_taken():
    config = TrainConfig(lr=1, warmup=0, weight_decay=0, eps=0, clip=None, epochs=0.1, betas=[0, 0.5], seed=0)
    assert config.total_steps(8) == 1
    assert TrainConfig(epochs=2.5, batch_size=2, accumulation=2).total_steps(17) == round(2.5 * 9 / 2)
    assert TrainConfig(steps=7).total_steps(1000) == 7
