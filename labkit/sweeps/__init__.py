"""Runs of an experiment, grids of runs times seeds, and their records."""

from labkit.sweeps.config import RunConfig
from labkit.sweeps.fitting import fit, prepare
from labkit.sweeps.grid import expand, read_experiment, run_experiment
from labkit.sweeps.records import (
    Results,
    SweepWarning,
    load,
    load_recorded,
    mean_interval,
    paired_interval,
    summarize,
)
from labkit.sweeps.runs import RunResult, data_hash, run
from labkit.sweeps.tasks import TASKS

__all__ = [
    "TASKS",
    "Results",
    "RunConfig",
    "RunResult",
    "SweepWarning",
    "data_hash",
    "expand",
    "fit",
    "load",
    "load_recorded",
    "mean_interval",
    "paired_interval",
    "prepare",
    "read_experiment",
    "run",
    "run_experiment",
    "summarize",
]
