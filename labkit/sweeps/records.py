"""Recorded runs: a file with one line of JSON each, which is only ever added to.

Whatever is wrong with such a file is reported, and nothing is thrown away: a line that a kill cut off, a run
recorded twice, a run on data that has changed since. Numbers from different data in one table would be worse
than none.

With n seeds the mean of a metric is known to within t s / sqrt(n), where s is the standard deviation between
seeds and t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom. With three seeds t is
4.3, not 1.96.
"""

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.checks import check_choice, needed
from labkit.files.reading import parse_json, read_bytes
from labkit.files.writing import explained, new_file
from labkit.paths import data_folder
from labkit.sweeps import runs
from labkit.sweeps.config import RunConfig

if TYPE_CHECKING:
    from pandas import DataFrame

STATUSES = ("done", "diverged", "failed")
MAX_BYTES = 2**30  # of a file of results


class SweepWarning(UserWarning):
    """Something in a file of results is not as it should be; nothing was changed or thrown away."""


@dataclass
class Results:
    """Recorded runs: `records` on the data as it is now, and `problems` found in the file, in words."""

    records: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def by_config(self) -> dict[RunConfig, dict]:
        """The records by what was run."""
        return {RunConfig.from_dict(record["config"]): record for record in self.records}

    def to_frame(self) -> "DataFrame":
        """One row per run: its settings, `status`, its metrics (missing if it diverged or failed), `seconds`,
        and `diverged_at`.
        """
        rows = [
            {**r["config"], "status": r["status"], **r.get("metrics", {})}
            | {"seconds": r["seconds"], "diverged_at": r.get("step")}
            for r in self.records
        ]
        return needed("pandas", "Results.to_frame").DataFrame(rows)


def load(path: str | Path) -> Results:
    """Read a file of results.

    A damaged line, a repeated run or one on other data is reported and left out, never deleted.

    Raises:
        FileNotFoundError: nothing is recorded there; the message says how to make it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; make it with: python -m labkit.sweep experiments/{path.stem}.toml"
        )
    results, seen = Results(), set()
    lines = read_bytes(path, MAX_BYTES).split(
        b"\n"
    )  # not splitlines: a text in JSON may hold other ends of a line
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        try:
            record: Any = parse_json("it", line)
            config = RunConfig.from_dict(record["config"])
            check_complete(record)
        except (ValueError, KeyError, TypeError) as error:
            results.problems.append(f"line {number} cannot be read ({type(error).__name__}: {error})")
            continue
        if record["data"] != (now := runs.data_hash(config)):
            results.problems.append(
                f"line {number} was run on other data ({record['data']}, now {now}): {config}"
            )
        elif record.get("base_settings", now := runs.settings_hash(config.model)) != now:
            results.problems.append(
                f"line {number} was run with another config or tokenizer of {config.model} "
                f"({record['base_settings']}, now {now}): {config}"
            )
        elif config in seen:
            results.problems.append(f"line {number} repeats a run: {config}")
        else:
            seen.add(config)
            results.records.append(record)
    if results.problems:
        shown = "; ".join(results.problems[:3]) + (" …" if len(results.problems) > 3 else "")
        warnings.warn(
            f"{path.name}: left out {len(results.problems)} lines: {shown}", SweepWarning, stacklevel=2
        )
    return results


def check_complete(record: dict) -> None:
    """Raise a `KeyError` for what every record of a run has, and this one does not, or a `ValueError` for what cannot
    be.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "config": dict,
        "status": str,
        "seconds": (int, float),
        "data": str,
    }
    for key, kind in kinds.items():
        if not isinstance(record[key], kind):
            raise ValueError(f"{key}={record[key]!r}")
    check_choice("status", record["status"], STATUSES)
    metrics = record.get("metrics", {})
    if not isinstance(metrics, dict) or not all(
        isinstance(value, (int, float)) for value in metrics.values()
    ):
        raise ValueError("metrics that are not numbers")
    wrong = record.get("wrong", [])
    if not isinstance(wrong, list) or not all(isinstance(index, int) for index in wrong):
        raise ValueError("wrong, which must be a list of indices")


def load_recorded(name: str) -> Results:
    """The results that come with the course, by the name of their experiment: `load_recorded("rank")`."""
    return load(data_folder() / "results" / f"{name}.jsonl")


def is_cut_off(path: Path) -> bool:
    """Does the file end in the middle of a line?"""
    return path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0


def mend_last_line(path: Path) -> None:
    """Put aside a last line that a kill cut off, into NAME.broken; the next line then begins on its own."""
    if not is_cut_off(path):
        return
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    aside = path.with_name(f"{path.name}.broken")
    with new_file(aside) as part:
        part.write_bytes((aside.read_bytes() if aside.exists() else b"") + cut + b"\n")
    with new_file(path) as part:
        part.write_bytes(whole + b"\n" if whole else b"")
    warnings.warn(
        f"the last line of {path.name} was cut off; it is kept in {path.name}.broken, and its run is done again",
        SweepWarning,
        stacklevel=4,
    )


def append(path: Path, record: dict, sync: bool = True) -> None:
    """Add one line; with `sync` it is on disk when this returns, and without it survives a kill, not a loss of power.

    Raises:
        labkit.files.CannotWrite: the disk is full or the like; the file is as it was.
    """
    line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    with explained(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)
            if written != len(line):  # the disk took a part: the rest says why
                file.write(line[written:])
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; nan for the width of a single value.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    stats = needed("scipy.stats", "mean_interval")
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def summarize(frame: "DataFrame", by: str | list[str], metric: str) -> "DataFrame":
    """One row per value of `by`, over the runs that finished: the `mean` of `metric`, the `half`-width of its
    95 % interval, and `n`; `missing` counts the runs without the metric, which diverged or failed.
    """
    groups = frame.groupby(by, sort=False)[metric]
    made = groups.agg(
        mean="mean",
        half=lambda v: mean_interval(list(v.dropna()))[1] if v.notna().any() else math.nan,
        n="count",
    )
    return made.assign(missing=groups.size() - made["n"]).reset_index()


def paired_interval(
    first: Sequence[dict], second: Sequence[dict], n_items: int
) -> tuple[float, float, float]:
    """By how much the first method gets more items right than the second, over the same seeds: the difference of
    the shares, and the ends of its 95 % interval.

    Items and seeds are drawn anew together, 10,000 times (a two-way bootstrap): the next test set and the next
    seed would both be others. Pairing takes out what is hard for every method.

    Args:
        first, second: records of runs with `wrong`, one for each seed.
        n_items: how many items were tested.

    Raises:
        ValueError: the seeds are not the same, or a record does not say which items were wrong.
    """
    seeds = sorted(record["config"]["seed"] for record in first)
    if seeds != sorted(record["config"]["seed"] for record in second) or not seeds:
        raise ValueError(
            f"runs are paired by seed; the first method has {seeds}, the second "
            f"{sorted(record['config']['seed'] for record in second)}"
        )
    right = []
    for records in (first, second):
        table = np.ones((len(seeds), n_items))
        for record in records:
            if "wrong" not in record:
                raise ValueError(f"no items were kept of the run {record['config']}")
            table[seeds.index(record["config"]["seed"]), record["wrong"]] = 0
        right.append(table)
    return two_way_interval(right[0] - right[1])


def two_way_interval(difference: np.ndarray) -> tuple[float, float, float]:
    """The mean of paired differences, (seeds, items), and the ends of its 95 % interval: seeds and items are both drawn
    anew, 10,000 times.
    """
    seeds, items = difference.shape
    draw = np.random.default_rng(0)
    means = [
        difference[draw.integers(seeds, size=seeds)][:, draw.integers(items, size=items)].mean()
        for _ in range(10_000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)
