"""The step without numbers: large models in little memory, and what it refuses."""

import subprocess
import sys

import pytest

from labkit.memory.simulation import simulate
from tests.memory.conftest import SMALL, close


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_70b_step_is_planned_and_its_blocks_simulated_in_little_memory():
    code = """
from labkit.memory.resident import status
from labkit.memory.formulas import plan
from labkit.memory.simulation import simulate
from labkit.models.shapes import config_of
how = dict(checkpointing=True, max_length=1024)
whole = plan("llama-3-70b", "qlora", **how).peak
config = config_of("llama-3-70b")
config.num_hidden_layers = 2
print(whole, plan(config, "qlora", **how).peak, simulate(config, "qlora", **how).peak, status("VmHWM"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    whole, planned, simulated, resident = map(int, done.stdout.split())
    assert 40e9 < whole < 50e9
    assert close(planned, simulated, 0.01)
    assert resident < 2e9


def test_a_simulation_refuses_what_the_courses_step_does_not_have():
    with pytest.raises(ValueError, match="master=True is not part of this course's step, .*; use plan"):
        simulate(SMALL, "full", master=True)
    with pytest.raises(ValueError, match="recompute_act=False is not part .* use plan"):
        simulate(SMALL, "full", recompute_act=False)
