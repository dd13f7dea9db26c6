"""Grids of runs times seeds, each recorded as one line of JSON, and never computed twice.

A single run says little: another seed may change the order of two configurations. So every point of a sweep
is run with several seeds, and is shown with all of them and with the 95 % interval of their mean.

An experiment is a TOML file: settings that are `fixed`, and one or more grids, each of which is the product
of its lists.

    seeds = [0, 1, 2]
    [fixed]
    task = "austen"
    [[grid]]
    r = [1, 4, 16]
    lr = [1e-3, 3e-3]

    python -m labkit.sweep experiments/rank.toml [--jobs 2]     # makes or completes data/results/rank.jsonl

A killed sweep loses the runs under way and nothing else: start it again, and it does what is missing. A run
that diverges or cannot run is a result too, and is recorded as such.
"""

import itertools
import tomllib
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from labkit.paths import data_folder
from labkit.sweeps.config import RunConfig
from labkit.sweeps.processes import carry_out, default_jobs
from labkit.sweeps.records import Results, append, load, mend_last_line


def read_experiment(path: str | Path) -> list[RunConfig]:
    """The runs of an experiment file, in its order, the seeds innermost.

    Raises:
        ValueError: the file is missing or is not TOML, an unknown setting, an empty grid, or two runs that
            are the same.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return expand(tomllib.loads(text))
    except OSError as error:
        raise ValueError(f"cannot read the experiment {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def expand(experiment: dict) -> list[RunConfig]:
    """The runs of an experiment: every grid's product, times the seeds.

    Args:
        experiment: {"seeds": [...], "fixed": {setting: value}, "grid": [{setting: [values]}, ...]}.

    Raises:
        ValueError: see `read_experiment`.
    """
    unknown = set(experiment) - {"about", "seeds", "fixed", "grid"}
    if unknown:
        raise ValueError(f"unknown parts {sorted(unknown)}; an experiment has about, seeds, fixed and grid")
    seeds, grids = experiment.get("seeds", [0]), experiment.get("grid", [{}])
    configs = []
    for number, grid in enumerate(grids, 1):
        axes = {name: v if isinstance(v, list) else [v] for name, v in {**grid, "seed": seeds}.items()}
        empty = [name for name, values in axes.items() if not values]
        if empty:
            raise ValueError(f"grid {number} has no runs: {', '.join(empty)} is an empty list")
        for values in itertools.product(*axes.values()):
            configs.append(RunConfig.from_dict({**experiment.get("fixed", {}), **dict(zip(axes, values))}))
    refuse_duplicates(configs)
    return configs


def refuse_duplicates(configs: Sequence[RunConfig]) -> None:
    """Raise a `ValueError` if there are no runs, or two that are the same."""
    if not configs:
        raise ValueError("there are no runs: give at least one config, or a grid with values")
    seen: dict[RunConfig, int] = {}
    for i, config in enumerate(configs):
        if config in seen:
            raise ValueError(
                f"runs {seen[config] + 1} and {i + 1} are the same ({config}); take one of them out"
            )
        seen[config] = i


def run_experiment(
    experiment: str | Path | Sequence[RunConfig],
    path: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Results:
    """Do the runs of an experiment that are not recorded yet.

    Args:
        experiment: a TOML file (see the module docstring), or configs.
        path: where to record; default for a TOML file: data/results/NAME.jsonl.
        jobs: processes; default: see `default_jobs`. 0 runs in this process.
        progress: show a bar.

    Returns:
        The records of these runs, in their order. Ctrl-C ends the sweep and returns what there is.

    Raises:
        ValueError: see `read_experiment`; or no path for a list of configs.
        RuntimeError: another sweep is writing to `path`.
    """
    if isinstance(experiment, (str, Path)):
        configs, stem = read_experiment(experiment), Path(experiment).stem
        path = Path(path or data_folder() / "results" / f"{stem}.jsonl")
    elif path is None:
        raise ValueError("give the path of the file to record in")
    else:
        configs, path = list(experiment), Path(path)
        refuse_duplicates(configs)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            results = complete(configs, path, default_jobs() if jobs is None else jobs, progress)
    except Timeout:
        raise RuntimeError(f"another sweep is writing to {path}; wait for it, or stop it") from None
    recorded = results.by_config()
    return Results([recorded[config] for config in configs if config in recorded], results.problems)


def complete(configs: Sequence[RunConfig], path: Path, jobs: int, progress: bool) -> Results:
    """Add those of `configs` that `path` lacks; everything that is recorded there then."""
    mend_last_line(path)
    results = load(path) if path.exists() else Results()
    recorded = results.by_config()
    missing = [config for config in configs if config not in recorded]
    bar = tqdm(total=len(configs), initial=len(configs) - len(missing), unit="run", disable=not progress)
    try:
        for record in carry_out(missing, jobs):
            append(path, record)
            results.records.append(record)
            bar.set_postfix_str(headline(record))
            bar.update()
    except KeyboardInterrupt:
        results.problems.append("interrupted: some runs are missing; run again to complete them")
    finally:
        bar.close()
    return results


def headline(record: dict) -> str:
    """A run in a few words, for the progress bar: its status and its last metric."""
    counts = ("parameters", "tokens", "train_seconds")
    metrics = [(name, value) for name, value in record.get("metrics", {}).items() if name not in counts]
    return record["status"] + "".join(f" {name}={value:.3f}" for name, value in metrics[-1:])
