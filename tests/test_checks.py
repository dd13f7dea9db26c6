"""The checks of settings: what passes, what does not, and that the message says what is allowed."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.checks import (
    check_choice,
    check_number,
    check_positive,
    check_whole,
    is_number,
    is_whole,
    nearest,
    not_known,
)
from labkit.lora.config import LoRAConfig
from labkit.training.config import TrainConfig

NOT_NUMBERS = ["1", None, True, False, [1], 1j, Fraction(1, 2), torch.tensor(1.0), math.nan]


def test_the_nearest_name_ends_the_sentence():
    assert nearest("q_porj", ["q_proj", "v_proj"]) == "; did you mean 'q_proj'?"
    assert nearest("x", ["q_proj", "v_proj"]) == nearest("q_proj", []) == "."
    assert nearest(7, {"seven": 7}) == "."


def test_a_choice_is_one_of_those_allowed():
    check_choice("schedule", "linear", ("linear", "cosine"))
    check_choice("bits", 4, {4: "nf4", 8: "int8"})
    check_choice("dtype", None, (None, "fp32"))
    check_choice("name", np.str_("linear"), ["linear"])
    check_choice("flag", True, (True, False))


@pytest.mark.parametrize(
    ("value", "allowed", "message"),
    [
        ("cosin", ("linear", "cosine"), r"x='cosin' .* one of \('linear', 'cosine'\); did you mean 'cosine'\?$"),
        ("zzz", ("linear",), r"x='zzz' is not known; choose one of \('linear',\)$"),
        (True, (1, 2), r"x=True is not known; choose one of \(1, 2\)$"),
        (1.0, (1, 2), r"x=1.0 is not known"),
        (1, (True, False), r"x=1 is not known"),
        (["linear"], ("linear",), r"x=\['linear'\] is not known; .*; did you mean 'linear'\?$"),
        (None, iter(["a", "b"]), r"x=None is not known; choose one of \('a', 'b'\)$"),
        (np.array([1, 2]), (1, 2), "is not known"),
    ],
)  # fmt: skip
def test_another_choice_is_refused_with_all_that_are_allowed(value, allowed, message):
    with pytest.raises(ValueError, match=message):
        check_choice("x", value, allowed)


def test_what_is_not_known_can_end_with_advice():
    error = not_known("optimizer", "lion", ("adamw", "sgd"), usual="or give an optimizer")
    expected = "optimizer='lion' is not known; choose one of ('adamw', 'sgd'); or give an optimizer"
    assert isinstance(error, ValueError) and str(error) == expected


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none()), st.integers(-3, 3))
def test_whole_numbers_are_ints_of_at_least_so_much_and_no_bools(value, least):
    expected = type(value) is int and value >= least
    assert is_whole(value, least) is expected
    if expected:
        check_whole("x", value, least)
    else:
        with pytest.raises(ValueError, match=f"must be a whole number of at least {least}"):
            check_whole("x", value, least)


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_not_a_number_passes_no_check(value):
    assert not is_number(value) and not is_whole(value)
    for check in (
        lambda: check_whole("x", value),
        lambda: check_positive("x", value),
        lambda: check_number("x", value, at_least=-10),
    ):
        with pytest.raises(ValueError, match="x=.* must be a"):
            check()


@given(st.one_of(st.integers(), st.floats()))
def test_a_positive_number_is_finite_and_above_zero(value):
    if 0 < value < math.inf:
        check_positive("x", value)
    else:
        with pytest.raises(ValueError, match="must be a positive number"):
            check_positive("x", value)


def test_the_limits_of_a_number_are_said():
    for value in (0, 0.5, np.float64(0.25)):
        check_number("dropout", value, at_least=0, below=1)
    for value in (-0.1, 1, math.inf):
        with pytest.raises(ValueError, match=r"must be a number of at least 0 and below 1; a share$"):
            check_number("dropout", value, at_least=0, below=1, usual="a share")
    check_number("eps", 10**9, at_least=0)
    with pytest.raises(ValueError, match=r"eps=inf must be a number of at least 0$"):
        check_number("eps", math.inf, at_least=0)


def test_usual_values_end_the_message():
    with pytest.raises(ValueError, match=r"r=0 must be a whole number of at least 1; 8 is usual$"):
        check_whole("r", 0, usual="8 is usual")
    with pytest.raises(ValueError, match=r"lr='x' must be a positive number; 1e-3 is usual$"):
        check_positive("lr", "x", usual="1e-3 is usual")


def test_numbers_of_numpy_are_taken_and_kept_as_python_numbers_which_json_can_hold():
    config = TrainConfig(steps=np.int64(5), lr=np.float32(0.5), batch_size=np.int32(2))
    assert (config.steps, config.lr, config.batch_size) == (5, 0.5, 2)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["steps"] == 5
    assert LoRAConfig(r=np.int64(4), alpha=np.float64(8)) == LoRAConfig(r=4, alpha=8.0)
    with pytest.raises(ValueError, match="steps=0 must be a whole number of at least 1"):
        TrainConfig(steps=np.int64(0))
