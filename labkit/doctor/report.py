"""What the probes found, in the order of causes: as text, as a table for a notebook, and as JSON."""

import html
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from labkit.doctor.findings import HEALTHY, SICK, UNKNOWN, Finding
from labkit.doctor.probes import Probe

MARKS = {HEALTHY: "ok", SICK: "SICK", UNKNOWN: "?"}
WIDTH = 108


@dataclass(frozen=True)
class Report:
    """The findings of an examination.

    Attributes:
        subject: what was examined, in words.
        findings: each probe with its answer; causes come before their effects.
    """

    subject: str
    findings: tuple[tuple[Probe, Finding], ...]

    def __getitem__(self, name: str) -> Finding:
        """The answer of the probe with this name."""
        found = {probe.name: finding for probe, finding in self.findings}
        if name not in found:
            raise KeyError(f"there is no probe {name!r}; there are: {', '.join(found)}")
        return found[name]

    def of(self, outcome: str) -> list[str]:
        """The names of the probes with this outcome, in order."""
        return [probe.name for probe, finding in self.findings if finding.outcome == outcome]

    @property
    def first(self) -> str | None:
        """The name of the first probe that is sick, which is the diagnosis; None if none is."""
        return next(iter(self.of(SICK)), None)

    @property
    def is_sick(self) -> bool:
        return self.first is not None

    @property
    def verdict(self) -> str:
        """The diagnosis in a sentence, with what was not probed."""
        asked = len(self.findings) - len(self.of(UNKNOWN))
        if self.first is not None:
            return f"first finding: {self.first}: {self[self.first].says}"
        return f"nothing found by the {asked} of {len(self.findings)} probes that could be made"

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "subject": self.subject,
            "first": self.first,
            "findings": [
                {
                    "probe": probe.name,
                    "outcome": finding.outcome,
                    "number": plain(finding.number),
                    "measures": probe.measures,
                    "threshold": probe.threshold,
                    "why": probe.why,
                    "says": finding.says,
                    "cure": finding.cure,
                    "numbers": {name: plain(value) for name, value in finding.numbers.items()},
                }
                for probe, finding in self.findings
            ],
        }

    def __str__(self) -> str:
        lines = [self.subject, *wrapped(self.verdict, ""), ""]
        for probe, finding in self.findings:
            lines += wrapped(finding.says, f"{MARKS[finding.outcome]:<5} {probe.name:<15} ")
            if finding.outcome == SICK:
                lines += wrapped(f"measured: {probe.measures}: {shown(finding.number)}", " " * 22)
                lines += wrapped(f"sick from: {probe.threshold}, for {probe.why}", " " * 22)
                lines += wrapped(f"to do: {finding.cure}", " " * 22)
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            "<tr>"
            + "".join(
                f"<td style='text-align:left;vertical-align:top'>{cell}</td>" for cell in self.cells(*one)
            )
            + "</tr>"
            for one in self.findings
        ]
        head = "".join(
            f"<th style='text-align:left'>{name}</th>" for name in ("", "probe", "number", "finding")
        )
        return (
            f"<p><b>{html.escape(self.subject)}</b><br>{html.escape(self.verdict)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )

    @staticmethod
    def cells(probe: Probe, finding: Finding) -> list[str]:
        """The cells of a row of the table, as HTML."""
        says, name, cure = (html.escape(text) for text in (finding.says, probe.name, finding.cure))
        about = html.escape(f"{probe.measures}; sick: {probe.threshold}, for {probe.why}", quote=True)
        return [
            f"<b>{MARKS[finding.outcome]}</b>" if finding.outcome == SICK else MARKS[finding.outcome],
            f"<span title='{about}'>{name}</span>",
            shown(finding.number),
            says + (f"<br><i>To do:</i> {cure}" if cure else ""),
        ]


def shown(number: float | None) -> str:
    """A number as the report writes it; "" if there is none."""
    return "" if number is None else f"{number:.3g}"


def plain(number: float | None) -> float | str | None:
    """A number that JSON can hold: NaN and infinity become text."""
    return number if number is None or math.isfinite(number) else str(number)


def wrapped(text: str, first: str) -> list[str]:
    """Lines of `text`, the first behind `first`, the others below it."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)) or [
        first.rstrip()
    ]
