"""Functions of a notebook as a file: what is written, what other processes compute with it, what is refused."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from labkit.lab.rank_code import for_ranks
from labkit.scale import start
from labkit.training.loss import supervised_loss

FACTOR, SIZES, FOLDER, DTYPE = 3, {"a": [1, 2]}, Path("somewhere"), torch.float64


def added(x=FACTOR):
    return torch.full((x,), math.floor(2.9), dtype=DTYPE)


def twice(add: int) -> int:
    return [FACTOR * sum(SIZES["a"]) + add for _ in range(1)][0]  # noqa: RUF015


def on_a_rank():
    """Calls another, and itself only in name."""
    total = torch.tensor([twice(dist.get_rank())])
    dist.all_reduce(total)
    return int(total), added().tolist(), str(FOLDER), supervised_loss.__name__


def test_what_ranks_compute_is_what_the_functions_here_say():
    module = for_ranks(on_a_rank)
    assert Path(module.__file__).is_file() and "import" in Path(module.__file__).read_text()
    assert start(module.on_a_rank, 2) == [(19, [2.0] * 3, "somewhere", "supervised_loss")] * 2
    assert for_ranks(on_a_rank) is module
    both = for_ranks(on_a_rank, twice)
    assert both.twice(1) == 10 and both.__name__ != "" and isinstance(sys.modules[both.__name__], ModuleType)


def with_a_class_inside(n):
    class Inner(torch.nn.Module):
        size = FACTOR

    return Inner().size + n


def test_a_class_inside_a_function_goes_with_it():
    module = for_ranks(with_a_class_inside)
    assert module.__name__ == module.with_a_class_inside.__module__ and module.with_a_class_inside(1) == 4


MODEL = torch.nn.Linear(2, 2)


def uses_a_model():
    return MODEL.weight


def test_what_no_other_process_can_have_is_refused():
    with pytest.raises(
        ValueError, match="uses_a_model uses MODEL, a Linear that lives in this notebook only; .*argument"
    ):
        for_ranks(uses_a_model)
    with pytest.raises(ValueError, match="define it with def"):
        for_ranks(lambda: None)
