"""What a GPU has shown, beside what a formula says of it.

`make gpu` records measurements on a GPU in `data/results/gpu/NAME-OF-THE-CARD/SECTION.json` (`docs/gpu.md`). A lesson
reads the records of a section, and puts its own prediction beside each number, with the relative difference:

    gpu.recorded("ledger").beside(lambda row: plan(row["model"], …).peak, "allocated_bytes", "GB")

A measured number never takes the place of a formula: a table shows both, and a claim rests on both. Where there is no
record, both say so. A rehearsal on a CPU is not read, and a damaged record costs a sentence, not the lesson.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkit.checks import is_number
from labkit.files.reading import read_json
from labkit.paths import data_folder

SCHEMA = 1  # of the records that are read
NO_RECORD = "no record of this on a GPU yet: `make gpu` on a machine with one makes it (docs/gpu.md)"
PLANNED = "Planned, not measured on a GPU yet."
SHOWN = 6  # rows in a sentence
UNITS: dict[str, Callable[[float], str]] = {
    "GB": lambda value: f"{value / 1e9:.2f} GB",
    "GB/s": lambda value: f"{value:,.0f} GB/s",
    "×": lambda value: f"{value:.2f}×",
    "%": lambda value: f"{value:.0%}",
    "tokens": lambda value: f"{value:,.0f} tokens",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What was measured of one section, on one GPU.

    Attributes:
        section, date: of the record; the date is that of its last run.
        hardware, versions: as `make gpu` found them.
        complete: nothing was left to measure.
        rows: the numbers of each measurement, by its key.
        missing: what was not measured, and why.
    """

    section: str
    date: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    complete: bool
    rows: dict[str, Row]
    missing: dict[str, str]

    @property
    def where(self) -> str:
        """One line: the GPU, its driver, PyTorch, the date."""
        card, driver = self.hardware, self.hardware.get("driver")
        parts = [card["device"], f"{card['memory_bytes'] / 2**30:.0f} GiB"]
        parts += [f"driver {driver}"] if driver else []
        parts += [f"torch {self.versions['torch']}", f"{self.date} (make gpu)"]
        return "recorded on a GPU: " + ", ".join(parts)


@dataclass(frozen=True)
class Pair:
    """One number twice: `predicted` by a formula, and `measured`, in the row `key` of `record`."""

    record: Record
    key: str
    row: Row
    predicted: float
    measured: float

    @property
    def difference(self) -> str:
        """How far the formula is off, in percent of what was measured."""
        return f"{self.predicted / self.measured - 1:+.1%}" if self.measured else "–"


@dataclass(frozen=True)
class Comparison:
    """Numbers from GPUs beside a formula's; as text, a table for each GPU."""

    section: str
    records: tuple[Record, ...]
    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]
    unit: str
    names: tuple[str, str] = ("formula", "measured")
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = list(self.problems)
        for record in self.records:
            lines += [record.where, *self.table(record), *left_out(record)]
        return "\n".join(lines if self.records else [*lines, f"{self.section}: {NO_RECORD}"])

    def table(self, record: Record) -> list[str]:
        """The lines of one GPU."""
        show = UNITS[self.unit]
        lines = [["", *self.names, "difference", *(name.replace("_", " ") for name in self.also)]]
        for pair in self.of(record):
            numbers = [show(pair.predicted), show(pair.measured), pair.difference]
            lines.append([pair.key, *numbers, *(in_words(name, pair.row.get(name)) for name in self.also)])
        if len(lines) == 1:
            return ["  nothing of this was measured there"]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return [
            "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]

    def of(self, record: Record) -> list[Pair]:
        """The pairs from one record."""
        return [pair for pair in self.pairs if pair.record is record]

    def select(self, **values: Any) -> "Comparison":
        """The same of the rows in which these names have these values."""
        chosen = (p for p in self.pairs if all(p.row.get(name) == value for name, value in values.items()))
        return replace(self, pairs=tuple(chosen))

    def values(self, *names: str) -> dict[Any, float]:
        """The measured numbers by what their rows have under `names`; the first record that has one gives it."""
        found: dict[Any, float] = {}
        for pair in self.pairs:
            key = tuple(pair.row.get(name) for name in names)
            if not any(isinstance(part, (dict, list)) for part in key):
                found.setdefault(key if len(names) > 1 else key[0], pair.measured)
        return found

    def sentence(self, otherwise: str = PLANNED) -> str:
        """Evidence for a claim: what was measured, where, and what the formula says; `otherwise` if nothing was."""
        if not self.pairs:
            return otherwise
        show, sentences = UNITS[self.unit], []
        for record in self.records:
            mine = self.of(record)
            parts = [
                f"{pair.key}: {self.names[1]} {show(pair.measured)} ({self.names[0]} {show(pair.predicted)}, {pair.difference})"
                for pair in mine[:SHOWN]
            ]
            more = f"; and {len(mine) - SHOWN} more" if len(mine) > SHOWN else ""
            card = f"{record.hardware['device']} ({record.date}, make gpu)"
            sentences += [f"Measured on a GPU, {card}: {'; '.join(parts)}{more}."] if mine else []
        return " ".join(sentences)


@dataclass(frozen=True)
class Recorded:
    """The records of a section, complete ones first, the newest of them first; and what could not be read."""

    section: str
    records: tuple[Record, ...] = ()
    problems: tuple[str, ...] = ()

    def beside(
        self,
        formula: Callable[[Row], float | None],
        measured: str,
        unit: str,
        names: tuple[str, str] = ("formula", "measured"),
        also: tuple[str, ...] = (),
    ) -> Comparison:
        """Each measured number beside a formula's.

        Args:
            formula: the prediction for a row; None if it says nothing of it.
            measured: the name of the number in a row; rows without it are left out.
            unit: one of `UNITS`.
            names: headings of the two numbers.
            also: other names in a row that the table shows.
        """
        pairs, problems = [], list(self.problems)
        for record in self.records:
            for key, row in record.rows.items():
                if not is_finite(row.get(measured)):
                    continue
                try:
                    predicted = formula(row)
                except (
                    Exception
                ) as error:  # the record may be of other code: the lesson goes on without the row
                    problems.append(f"{key}: no formula for it ({type(error).__name__}: {error})")
                    continue
                if is_finite(predicted):
                    pairs.append(Pair(record, key, row, float(predicted), float(row[measured])))
        return Comparison(self.section, self.records, tuple(pairs), tuple(problems), unit, names, also)


def recorded(section: str, folder: str | Path | None = None) -> Recorded:
    """What was measured of a section, on each GPU of which there is a record.

    Args:
        section: "kernels", "ledger", "steps", "paging", "finetune" or "serving".
        folder: of the records; None: `data/results/gpu`.
    """
    folder = data_folder() / "results" / "gpu" if folder is None else Path(folder)
    records, problems = [], []
    for path in sorted(folder.glob(f"*/{section}.json")):
        try:
            records.append(read_record(path, section))
        except (OSError, ValueError) as error:
            reason = str(error).replace(f"{path} ", "").replace(str(path), "it")
            problems.append(f"{path.parent.name}/{path.name} is not read: {reason}")
    records.sort(key=lambda record: (record.complete, record.date, len(record.rows)), reverse=True)
    return Recorded(section, tuple(records), tuple(problems))


def read_record(path: Path, section: str) -> Record:
    """The record in a file; `data/results/gpu/schema.json` describes its form.

    Raises:
        ValueError: not a record of this section from a GPU.
        OSError: it cannot be read.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"it is not a record with schema {SCHEMA}")
    if found.get("section") != section:
        raise ValueError(f"it is a record of {found.get('section')!r}")
    if found.get("rehearsal") is not False:
        raise ValueError("it is of a rehearsal on a CPU, and says nothing about a GPU")
    try:
        rows = {row["key"]: row for row in found["rows"]}
        measured = {key: flat(row["numbers"]) for key, row in rows.items() if row["outcome"] == "measured"}
        missing = {key: reason_of(row) for key, row in rows.items() if key not in measured}
        card, torch = found["hardware"], found["versions"]["torch"]
        if not all(isinstance(text, str) for text in (card["device"], found["date"], torch, *rows)):
            raise TypeError("text is wanted")
        if not is_finite(card["memory_bytes"]):
            raise TypeError("memory_bytes is not a number")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None
    return Record(
        section, found["date"], card, found["versions"], found.get("complete") is True, measured, missing
    )


def reason_of(row: Row) -> str:
    """Why a row has no numbers."""
    return f"{row['outcome']}: {row['reason']}" if row.get("reason") else str(row["outcome"])


def flat(numbers: Mapping[str, Any]) -> Row:
    """The numbers of a row, those of its `settings` among them."""
    return {**numbers.get("settings", {}), **numbers}


def valve_opened(paging: Recorded) -> bool | None:
    """Did a paged run get past the length at which the plain run died, with the same losses? None: not measured."""
    row = next((record.rows["the valve"] for record in paging.records if "the valve" in record.rows), {})
    died, reached = row.get("plain_died_at_length"), row.get("paged_reached_length")
    if not is_finite(died) or not is_finite(reached):
        return None
    return reached >= died and row.get("losses_equal") is True


def left_out(record: Record) -> list[str]:
    """What a record lacks, and why, line by line."""
    lines = [f"  not measured there: {key} ({why})" for key, why in list(record.missing.items())[:SHOWN]]
    more = len(record.missing) - SHOWN
    return lines + ([f"  and {more} more"] if more > 0 else [])


def in_words(name: str, value: Any) -> str:
    """A value as a table shows it; the end of its name says in which unit."""
    if value is None or isinstance(value, (dict, list)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and is_finite(value):
        return UNITS["GB"](value)
    if is_finite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.3g}"
    return str(value)


def is_finite(value: Any) -> bool:
    """Is it a number, and finite?"""
    return is_number(value) and math.isfinite(value)


def settle(
    holds: Callable[[Any, float], bool], predicted: Mapping[Any, float], measured: Mapping[Any, float]
) -> str:
    """The verdict on a claim that several numbers decide; where one was measured, it counts and not its prediction.

    Args:
        holds: of a key and its number: is it as the claim says?
        predicted: numbers by a formula.
        measured: numbers from a GPU; those of the same key replace a prediction.

    Returns:
        "confirmed" if all hold, "refuted" if none does, "depends" if some do, or if there are no numbers.
    """
    answers = {bool(holds(key, value)) for key, value in {**predicted, **measured}.items()}
    return "confirmed" if answers == {True} else "refuted" if answers == {False} else "depends"
