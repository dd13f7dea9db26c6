"""torchrun starts the same ranks: the same losses as one process, and an end when one fails or hangs."""

import json
from pathlib import Path

import psutil
import pytest

from labkit.scale import torchrun
from tests.scale.test_data_parallel import ROUNDING, alone  # noqa: F401  (a fixture)

SCRIPT = Path(__file__).with_name("under_torchrun.py")


def ranks_alive() -> list[int]:
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if SCRIPT.name in " ".join(p.info["cmdline"] or [])
    ]


@pytest.mark.slow
def test_ranks_under_torchrun_take_the_steps_of_one_process(alone):  # noqa: F811
    printed = torchrun.torchrun(SCRIPT, 2, "train")
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(alone["losses"], abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "seconds", "said"),
    [
        ("fail", 60, "FloatingPointError: the loss is NaN"),
        ("hang", 15, "took more than 15 seconds on 2 ranks; all were ended"),
    ],
)
def test_a_rank_that_fails_or_hangs_ends_all(what, seconds, said):
    with pytest.raises(torchrun.ScriptFailed, match=said):
        torchrun.torchrun(SCRIPT, 2, what, seconds=seconds)
    assert ranks_alive() == []


def test_a_script_that_is_not_there():
    with pytest.raises(ValueError, match=r"^script='nowhere.py' is not a file"):
        torchrun.torchrun("nowhere.py", 2)
