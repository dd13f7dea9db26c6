"""Numbers in the text of a lesson, held to the outputs beside them.

    The layers take 4.13<!--= cell-10--> bits per weight.

A mark right after a number, invisible on the page, names the cell whose output has that number. The page shows fewer digits than
the output, or as many: 4.13 agrees with 4.127, and contradicts 4.21. Where a cell prints many numbers, a text says which one
is meant: `<!--= cell-10 "bits"-->` is the first number after “bits”. Units are looked at: “4.1 million” agrees with
4,149,504, and “38 %” with 0.38.

Nothing runs for this: outputs are committed with the page. `scripts/refresh_notebooks.py` says what a new run contradicts, and
a test does so for every lesson. Constants and numbers from papers stay unmarked.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
MARK = re.compile(
    rf"({NUMBER})<!--= *([\w-]+)(?: +\"([^\"]+)\")? *-->(?:\W{{0,3}}?(%|million|billion|thousand))?"
)
SPOILT = re.compile(r"<!--=.*?-->")  # what looks like a mark, well made or not
UNITS = {"%": 1e-2, "thousand": 1e3, "million": 1e6, "billion": 1e9}


@dataclass(frozen=True)
class ProseNumber:
    """A marked number.

    Attributes:
        where: the cell of text that it stands in.
        shown: as it is written, such as "4,149,504".
        source: the cell whose outputs have it.
        after: the text in these outputs that it follows; empty for anywhere.
        unit: "%", "million", …, or empty.
    """

    where: str
    shown: str
    source: str
    after: str = ""
    unit: str = ""

    def agrees(self, value: float) -> bool:
        """Is `value`, rounded to the digits that are shown, this number? With its unit, or as it stands."""
        shown = value_of(self.shown)
        half = 0.5 * 10 ** -len(self.shown.partition(".")[2]) * (1 + 1e-9)
        return any(abs(value / unit - shown) <= half for unit in {1.0, UNITS.get(self.unit, 1.0)})


def value_of(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def prose_numbers(cells: list[dict]) -> Iterator[ProseNumber]:
    """The marked numbers of a notebook.

    Raises:
        ValueError: something looks like a mark and is none.
    """
    for cell in cells:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            found = [
                ProseNumber(cell["id"], m[1], m[2], m[3] or "", m[4] or "") for m in MARK.finditer(source)
            ]
            if len(found) != len(SPOILT.findall(source)):
                raise ValueError(
                    f"cell {cell['id']}: a mark stands right after a number and is written <!--= cell-id-->, or "
                    '<!--= cell-id "text before it"-->'
                )
            yield from found


def output_text(cell: dict) -> str:
    """What a code cell shows, as text: printed lines, tables, without tags."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        part = (
            output.get("text")
            or data.get("text/markdown")
            or data.get("text/html")
            or data.get("text/plain")
            or ""
        )
        texts.append("".join(part))
    return unescape(re.sub(r"<[^>]+>", " ", "\n".join(texts)))


def contradictions(path: str | Path) -> list[str]:
    """What the text of a notebook says against its own outputs, a line each.

    Raises:
        ValueError: see `prose_numbers`.
    """
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    outputs = {cell["id"]: output_text(cell) for cell in cells if cell["cell_type"] == "code"}
    return [
        f"{Path(path).name}: {why}"
        for number in prose_numbers(cells)
        if (why := contradiction(number, outputs))
    ]


def contradiction(number: ProseNumber, outputs: dict[str, str]) -> str:
    """In words; empty if the outputs have the number."""
    said = f"cell {number.where} says {number.shown}"
    if number.source not in outputs:
        return f"{said} and refers to cell {number.source}, which is no cell of code here"
    text = outputs[number.source]
    if number.after and number.after not in text:
        return f"{said}, and the output of {number.source} has no “{number.after}”"
    if number.after:
        text = text.partition(number.after)[2]
    values = [value_of(one) for one in re.findall(NUMBER, text)][: 1 if number.after else None]
    if any(number.agrees(value) for value in values):
        return ""
    place = f"after “{number.after}” {values[0]:g}" if number.after and values else "no such number"
    return f"{said}; the output of {number.source} has {place}"
