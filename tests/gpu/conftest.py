"""Sections of `scripts/gpu_day.py`: their code is not a part of labkit, and is found here."""

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture
def stage(tmp_path):
    """A rehearsal on the CPU."""
    from gpu.measurement import Stage

    return Stage(torch.device("cpu"), torch.float32, True, tmp_path)
