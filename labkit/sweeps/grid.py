"""Grids of runs times seeds, each recorded as one line of JSON, and never computed twice.

Another seed may change the order of two configurations. So every point of a sweep
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

A grid's setting, `seeds` of its own too, comes before a common one, and all are checked before anything runs. A
killed sweep loses the runs under way: start it again, and it does what is missing. A run that diverges or cannot
run is a result too.
"""

import itertools
import math
import os
import tomllib
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm.auto import tqdm

from labkit.checks import check_choice, check_positive, check_whole, nearest
from labkit.files.reading import read_bytes
from labkit.files.writing import only_one
from labkit.models.fetching import ModelUnavailable
from labkit.models.loading import local_folder
from labkit.paths import data_folder
from labkit.sweeps.cluster import CLUSTERS, carry_out_on
from labkit.sweeps.config import RunConfig
from labkit.sweeps.processes import carry_out, default_jobs
from labkit.sweeps.ray_tune import RAY, carry_out_on_ray
from labkit.sweeps.records import Results, append, is_cut_off, load, mend_last_line

PARTS = {"about": str, "seeds": list, "fixed": dict, "grid": list}
MAX_RUNS = 100_000
HERE = "here"  # processes of this machine, not jobs of a cluster


def read_experiment(path: str | Path) -> list[RunConfig]:
    """The runs of an experiment file, in its order, the seeds innermost.

    Raises:
        ValueError: the file is missing or is not TOML, or see `expand`. The message begins with the file.
    """
    try:
        return expand(tomllib.loads(read_bytes(path).decode("utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read the experiment {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path} ')}") from None


def expand(experiment: dict) -> list[RunConfig]:
    """The runs of an experiment: every grid's product, times the seeds.

    Args:
        experiment: {"seeds": [...], "fixed": {setting: value}, "grid": [{setting: [values]}, ...]}.
            A grid may have `seeds` of its own.

    Raises:
        ValueError: a part that no experiment has or of another kind, a setting unknown or out of its range, an empty
            grid, or two runs that are the same. The message says in which grid.
    """
    check_parts(experiment)
    seeds, fixed, grids = (
        experiment.get("seeds", [0]),
        experiment.get("fixed", {}),
        experiment.get("grid", [{}]),
    )
    configs: list[RunConfig] = []
    for number, grid in enumerate(grids, 1):
        own = grid.get("seeds", seeds)
        for seed in own if isinstance(own, list) else [own]:
            check_whole("seeds: seed", seed, at_least=0)
        settings = {name: v for name, v in grid.items() if name != "seeds"} | {"seed": own}
        axes = {name: v if isinstance(v, list) else [v] for name, v in settings.items()}
        empty = [name for name, values in axes.items() if not values]
        if empty:
            raise ValueError(f"grid {number} has no runs: {', '.join(empty)} is an empty list")
        if len(configs) + math.prod(len(values) for values in axes.values()) > MAX_RUNS:
            raise ValueError(f"more than {MAX_RUNS:,} runs with grid {number}; take values out of its lists")
        for values in itertools.product(*axes.values()):
            try:
                configs.append(RunConfig.from_dict({**fixed, **dict(zip(axes, values))}))
            except ValueError as error:
                raise ValueError(f"grid {number}: {error}") from None
    refuse_duplicates(configs)
    return configs


def check_parts(experiment: dict) -> None:
    """Raise a `ValueError` that says which part of an experiment is not what it must be, and how it is written."""
    unknown = sorted(set(experiment) - set(PARTS))
    if unknown:
        is_setting = unknown[0] in RunConfig.__dataclass_fields__
        hint = "; settings of all runs stand under [fixed]" if is_setting else nearest(unknown[0], PARTS)
        raise ValueError(f"unknown parts {unknown}; an experiment has about, seeds, fixed and grid{hint}")
    written = {
        "about": 'about = "…"',
        "seeds": "seeds = [0, 1, 2], a list",
        "fixed": "[fixed], in single brackets, with name = value in the lines below",
        "grid": "[[grid]], in double brackets, with name = [values] in the lines below",
    }
    for part, value in experiment.items():
        is_right = isinstance(value, PARTS[part])
        if part == "grid" and is_right:
            is_right = all(isinstance(one, dict) for one in value)
        if not is_right:
            shown = f"a table with {', '.join(value)}" if isinstance(value, dict) else repr(value)
            raise ValueError(f"{part} is {shown}; write {written[part]}")
    fixed = experiment.get("fixed", {})
    for name, value in fixed.items():
        if isinstance(value, list):
            raise ValueError(f"{name}={value} under [fixed] is a list; values to try stand under [[grid]]")
    for number, table in enumerate([fixed, *experiment.get("grid", [])]):
        if "seed" in table:
            place = f"grid {number}" if number else "[fixed]"
            raise ValueError(
                f"seed={table['seed']!r} in {place}; seeds of all runs stand at the top, or in a grid those of its "
                "runs: seeds = […]"
            )


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
    minutes: float | None = None,
    keep: str | Path | None = None,
    on: str = HERE,
) -> Results:
    """Do the runs of an experiment that are not recorded yet.

    Args:
        experiment: a TOML file (see the module docstring), or configs.
        path: where to record; default for a TOML file: data/results/NAME.jsonl.
        jobs: processes; default: see `default_jobs`. 0 runs in this process.
        progress: show a bar.
        minutes: how long a run may take before it is stopped and recorded as failed; None for no limit.
        keep: a folder for the adapters; a record names its own under "adapter". None to keep none.
        on: "here", in processes of this machine; "slurm", as jobs of a cluster (`labkit.sweeps.cluster`), "local" for
            the same on this machine; or "ray", as trials of Ray Tune (`labkit.sweeps.ray_tune`).

    Returns:
        The records of these runs, in their order, and in `problems` what kept others from being run. Ctrl-C ends the
        sweep and returns what there is.

    Raises:
        ValueError: see `read_experiment`; a model that no run could load; or no path for a list of configs. Nothing
            has run then.
        labkit.files.InUse: another sweep is writing to `path`.
        labkit.files.CannotWrite: `path` cannot be written to; what is recorded there is intact.
    """
    jobs = default_jobs() if jobs is None else jobs
    check_choice("on", on, (HERE, *CLUSTERS, RAY))
    check_whole("jobs", jobs, at_least=0 if on == HERE else 1)
    if minutes is not None:
        check_positive("minutes", minutes)
        if jobs == 0:
            raise ValueError(
                "minutes are counted for runs in processes of their own: give jobs=1 or more with it"
            )
    if isinstance(experiment, (str, Path)):
        configs, name = read_experiment(experiment), str(experiment)
        path = path or data_folder() / "results" / f"{Path(experiment).stem}.jsonl"
    elif path is None:
        raise ValueError("give the path of the file to record in")
    else:
        configs, name = list(experiment), "the experiment"
        refuse_duplicates(configs)
    path = Path(os.path.realpath(path))  # one lock for one file, under whatever name
    with warnings.catch_warnings():  # a look; the warnings come with what is returned
        warnings.simplefilter("ignore")
        missing = missing_from(load(path) if path.exists() else Results(), configs)
    for model in dict.fromkeys(config.model for config in missing):
        try:
            local_folder(model)
        except ModelUnavailable as error:
            raise ValueError(f"{name}: {error}") from None
    if missing or is_cut_off(path):
        taken = f"another sweep is writing to {path}; wait for it, or stop it"
        with only_one(path.with_name(f".{path.name}.lock"), taken):
            results = complete(configs, path, jobs, progress, minutes, keep, on)
    else:  # nothing is written, and the place may be read-only
        results = load(path)
    recorded = results.by_config()
    return Results([recorded[config] for config in configs if config in recorded], results.problems)


def missing_from(results: Results, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Those of `configs` that are not recorded."""
    recorded = results.by_config()
    return [config for config in configs if config not in recorded]


def complete(
    configs: Sequence[RunConfig],
    path: Path,
    jobs: int,
    progress: bool,
    minutes: float | None = None,
    keep: str | Path | None = None,
    on: str = HERE,
) -> Results:
    """Add those of `configs` that `path` lacks; everything that is recorded there then."""
    mend_last_line(path)
    results = load(path) if path.exists() else Results()
    missing = missing_from(results, configs)
    bar = tqdm(total=len(configs), initial=len(configs) - len(missing), unit="run", disable=not progress)
    kept = Path(keep).absolute() if keep else None
    try:
        left = path.with_name(f".{path.stem}.jobs")  # where jobs leave their records
        if on == HERE:
            records = carry_out(missing, jobs, minutes, kept)
        elif on == RAY:
            records = carry_out_on_ray(missing, jobs, left, minutes, kept)
        else:
            records = carry_out_on(missing, on, jobs, left, minutes, kept)
        with closing(records) as done:
            for record in done:
                if record["status"] == "not run":
                    run = RunConfig.from_dict(record["config"])
                    results.problems.append(f"not run: {run} ({record['error']}); start again to do it")
                    continue
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
