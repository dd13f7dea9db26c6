"""The record of a section: one JSON file, written anew after every measurement, so that nothing measured is lost.

Its form is that of `data/results/gpu/schema.json`; lessons read it by `labkit.lab.gpu`. Of a rehearsal there is a
record too, under `build/`: its numbers are not those of a GPU, and no lesson reads them.
"""

import datetime
import math
import re
from pathlib import Path
from typing import Any

from gpu.machine import ROOT, code, hardware, left_out, name_of, versions
from gpu.measurement import Numbers, Section, Stage
from labkit.files.reading import read_json
from labkit.files.writing import write_json

SCHEMA = 1
KEPT = ("measured", "out of memory")  # outcomes that a further run leaves as they are
DIED = "the process ended without a word"


def folder_of(stage: Stage, results: Path | None = None) -> Path:
    """Where the records of this device are: `data/results/gpu/nvidia-h200`, or `build/gpu` of a rehearsal."""
    name = re.sub(r"[^a-z0-9]+", "-", name_of(stage.device).lower()).strip("-")
    if results is None:
        results = ROOT / ("build/gpu" if stage.rehearsal else "data/results/gpu")
    return results / name


class Record:
    """What was measured of a section, on one device with one set of versions.

    Attributes:
        path: of the file.
        all_before: the rows of an earlier run.
        rows: by key, what came of each measurement: its `outcome`, `reason`, `seconds`, `code`, `numbers`.
    """

    def __init__(self, section: Section, stage: Stage, folder: Path):
        self.section, self.stage = section, stage
        self.path = folder / f"{section.name}.json"
        self.code = code()
        self.head = {
            "schema": SCHEMA,
            "section": section.name,
            "title": section.title,
            "rehearsal": stage.rehearsal,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(stage.device),
            "versions": versions(),
            "dtype": str(stage.dtype).removeprefix("torch."),
            "seed": stage.seed,
            "left_out": left_out(),
        }
        self.all_before = self.before()
        self.rows = {key: row for key, row in self.all_before.items() if row["outcome"] in KEPT}

    def before(self) -> dict[str, dict[str, Any]]:
        """The rows of an earlier run on the same hardware, with the same versions."""
        try:
            found = read_json(self.path)
        except FileNotFoundError:
            return {}
        except ValueError:  # not JSON, or not readable: it is measured again
            return {}
        same = ("schema", "section", "rehearsal", "hardware", "versions", "dtype", "seed")
        if not isinstance(found, dict) or any(found.get(name) != self.head[name] for name in same):
            return {}
        return {row["key"]: row for row in found.get("rows", [])}

    def begin(self, key: str) -> None:
        """Note that a measurement is under way: if its process dies, this is what came of it."""
        self.add(key, "failed", 0, reason=DIED)

    def killed(self) -> set[str]:
        """The measurements during which a process died."""
        return {key for key, row in self.all_before.items() if row.get("reason") == DIED}

    def is_done(self, key: str) -> bool:
        """Was this measured, by an earlier run or by this one?"""
        return key in self.rows and self.rows[key]["outcome"] in KEPT

    def add(
        self, key: str, outcome: str, seconds: float, numbers: Numbers | None = None, reason: str = ""
    ) -> None:
        """Note what came of a measurement, and write the file."""
        self.rows[key] = {
            "key": key,
            "outcome": outcome,
            "seconds": round(seconds, 2),
            "code": self.code,
            **({"reason": without_paths(reason)} if reason else {}),
            "numbers": publishable(numbers or {}),
        }
        self.write()

    def write(self, complete: bool = False) -> None:
        """Write the file; `complete` says that nothing is left to measure."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        measured = {row["key"]: row["numbers"] for row in self.rows.values() if row["outcome"] == "measured"}
        try:
            conclusions = self.section.conclude(measured) if measured else []
        except Exception as error:  # what was measured is written in any case
            conclusions = [f"no conclusion: {type(error).__name__}: {error}"]
        rest = {
            "complete": complete,
            "conclusions": publishable(conclusions),
            "rows": list(self.rows.values()),
        }
        write_json(self.path, self.head | rest)


def publishable(value: Any) -> Any:
    """The same with None for numbers that JSON does not have, and without paths of this machine."""
    if isinstance(value, dict):
        return {str(key): publishable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [publishable(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_paths(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """The same with the name of a file instead of its absolute path, and "…" instead of that of a folder."""

    def name_of(path: re.Match) -> str:
        name = path[0].rpartition("/")[2].rstrip(".")
        return name if "." in name.lstrip(".") else "…"

    return re.sub(r"(?<![\w.~/])(/[\w.@+-]+){2,}/?|(?<![\w.~/])/(home|root|tmp)\b", name_of, text)
