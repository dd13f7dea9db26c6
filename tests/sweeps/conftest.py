"""A sweep of two runs, recorded once for every test that damages its file."""

import pytest

from labkit.sweeps import grid
from tests.sweeps.cases import configs


@pytest.fixture
def recorded_file(tmp_path):
    path = tmp_path / "r.jsonl"
    grid.run_experiment(configs(r=[1]), path, jobs=0, progress=False)
    return path
