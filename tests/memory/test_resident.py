"""What the operating system sees of a step."""

import subprocess
import sys

import pytest

from labkit.memory.formulas import plan
from labkit.memory.resident import measure_resident
from tests.memory.conftest import close


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_operating_system_sees_what_the_allocator_says():
    seen = measure_resident("tiny-llama", "lora", dtype="fp32", batch_size=4, max_length=512, supervised=0.5)
    assert close(seen["step"], seen["allocated"], 0.10)
    planned = plan(
        "tiny-llama", "lora", dtype="fp32", device="cpu", batch_size=4, max_length=512, supervised=0.5
    )
    assert close(planned.peak - planned.static, seen["allocated"], 0.05)


def test_a_mistake_is_found_before_a_process_is_started(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match="'sequence' is not a setting; it is called 'max_length' here"):
        measure_resident("tiny-llama", "lora", sequence=512)


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="the step in a process of its own failed: .*tiny-lama"):
        measure_resident("tiny-lama", "lora")
