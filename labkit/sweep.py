"""The door to `labkit.sweeps` from the command line.

    python -m labkit.sweep experiments/rank.toml [--jobs 2] [--minutes 60] [--on slurm|local|ray]

makes or completes data/results/rank.jsonl, and prints what it holds.
"""

import argparse
import sys
from pathlib import Path

from labkit.sweeps.grid import run_experiment


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m labkit.sweep", description="Run or complete an experiment."
    )
    parser.add_argument("experiment", help="a TOML file, such as experiments/rank.toml")
    parser.add_argument("--jobs", type=int, help="processes; default: one per core")
    parser.add_argument("--minutes", type=float, help="stop a run that takes longer, and record that it did")
    parser.add_argument("--out", type=Path, help="where to record; default: data/results/NAME.jsonl")
    parser.add_argument("--keep", type=Path, help="a folder for the adapters; default: they are not kept")
    parser.add_argument(
        "--on",
        default="here",
        help="slurm: a job array; local: the same jobs on this machine; ray: trials of Ray Tune",
    )
    chosen = parser.parse_args(arguments)
    try:
        results = run_experiment(
            chosen.experiment,
            chosen.out,
            chosen.jobs,
            minutes=chosen.minutes,
            keep=chosen.keep,
            on=chosen.on,
        )
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    frame = results.to_frame()
    if not frame.empty:
        varied = [c for c in frame.columns if frame[c].astype(str).nunique() > 1 or c == "status"]
        print(frame[varied].to_string(index=False))
    for problem in results.problems:
        print(f"warning: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()
