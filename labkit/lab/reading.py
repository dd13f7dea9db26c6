"""How long a lesson takes, counted from the notebook itself.

    minutes = words / 200 + lines of code / 3

The words are those of the text, and the lines those of code whose source is open: a collapsed cell (plots, imports, the
text of a prediction) is for the curious. Three lines a minute is the pace of someone who follows the code; skimming is
five times as fast. An exercise's own minutes stand at its head, `(core, easy, 4 minutes)`, and its cell is counted
nowhere else. A heading that says *optional* or *appendix* takes everything up to the next heading of its level out of
the core, but for headings below it that say *core*.

The box at the head of a lesson states these numbers; a test holds it to them.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

WORDS, LINES = 200, 3  # per minute
COUNTED = ("words", "lines", "core_words", "core_lines", "exercises", "core_exercises")
HEADING = re.compile(r"^(#{1,6}) +(.*)$")
LEFT_OUT = re.compile(r"<!--.*?-->|<details.*?</details>", re.S)  # not seen, or folded
EXERCISE = re.compile(r"\((core)?(?:, )?(easy|medium|hard)?(?:, )?(\d+) minutes\)")
STATED = re.compile(r"read (\d+)(?:, the core (\d+))?(?: · exercises (\d+)(?:, [^·|]*?ones (\d+))?)?")
RUN = re.compile(r"run (?:about )?([\d.]+)(½?)(?: to ([\d.]+))?")


@dataclass(frozen=True)
class ReadingTime:
    """Minutes of one lesson.

    Attributes:
        words, lines: of text and of open code, in all.
        core_words, core_lines: of the core.
        exercises, core_exercises: minutes that stand at the heads of the exercises; without the open experiment.
        run: minutes of waiting that the box states, the longer end of a range.
    """

    words: int = 0
    lines: int = 0
    core_words: int = 0
    core_lines: int = 0
    exercises: int = 0
    core_exercises: int = 0
    run: float = 0.0

    @property
    def reading(self) -> int:
        return math.ceil(self.words / WORDS + self.lines / LINES)

    @property
    def core(self) -> int:
        return math.ceil(self.core_words / WORDS + self.core_lines / LINES)

    @property
    def whole_core(self) -> float:
        """Everything that a reader of the core spends: reading, its exercises, waiting."""
        return self.core + self.core_exercises + self.run


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def is_folded(cell: dict) -> bool:
    return bool(cell.get("metadata", {}).get("jupyter", {}).get("source_hidden"))


def reading_time(path: str | Path) -> ReadingTime:
    """Count a notebook.

    Raises:
        ValueError: there is no notebook at `path`.
    """
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a notebook that can be read: {error}") from None
    counts = dict.fromkeys(COUNTED, 0)
    for cell, is_core in zip(cells, core_cells(cells)):
        if cell["cell_type"] == "markdown":
            kind, n = "words", len(LEFT_OUT.sub("", source_of(cell)).split())
        else:
            kind, n = "lines", open_lines(cell)
        counts[kind] += n
        counts[f"core_{kind}"] += n if is_core else 0
    for is_core, minutes in graded_exercises(cells):
        counts["exercises"] += minutes
        counts["core_exercises"] += minutes if is_core else 0
    run = RUN.search(source_of(cells[0]))
    waiting = max(float(run[1]), float(run[3] or 0)) + (0.5 if run[2] else 0) if run else 0.0
    return ReadingTime(**counts, run=waiting)


def graded_exercises(cells: list[dict]) -> list[tuple[bool, int]]:
    """(core or not, minutes) of each exercise. Where a lesson marks none of them, all belong to the core."""
    found = []
    for cell in cells:
        for line in source_of(cell).splitlines() if cell["cell_type"] == "markdown" else ():
            is_section = line.startswith("#") and "xercise" not in line
            for core, level, minutes in () if is_section else EXERCISE.findall(line):
                if core or level:
                    found.append((bool(core), int(minutes)))
    return found if any(core for core, _ in found) else [(True, minutes) for _, minutes in found]


def open_lines(cell: dict) -> int:
    """Lines of code to follow: none of a collapsed cell or of an exercise, whose minutes are stated.

    A module's source that a cell prints is code to follow, too.
    """
    source = source_of(cell)
    if is_folded(cell) or "### BEGIN SOLUTION" in source or source.startswith("# lab.catch_up("):
        return 0
    printed = "getsource(" in source
    texts = (
        ["".join(o["text"]) for o in cell.get("outputs", []) if o["output_type"] == "stream"]
        if printed
        else []
    )
    return sum(bool(line.strip()) for text in (source, *texts) for line in text.splitlines())


def core_cells(cells: list[dict]) -> list[bool]:
    """For each cell: is it in the core? A cell of text is where its first heading puts it."""
    marks: dict[int, bool] = {}  # level of the headings that hold here: core, or not
    found = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for line in source_of(cell).splitlines():
                if heading := HEADING.match(line):
                    level, title = len(heading[1]), heading[2].lower()
                    above = all(marks[k] for k in marks if k < level)
                    said = (
                        False
                        if re.search(r"\(optional|appendix", title)
                        else True
                        if "(core" in title
                        else above
                    )
                    marks = {k: v for k, v in marks.items() if k < level} | {level: said}
        found.append(marks[max(marks)] if marks else True)
    return found


def core_code(cells: list[dict]) -> list[bool]:
    """For each cell: is it code that a reader of the core runs? All code of the core but the exercises outside it."""
    kept, asked = [], True
    for cell, is_core in zip(cells, core_cells(cells)):
        if cell["cell_type"] == "markdown":
            asks = [m for m in EXERCISE.finditer(source_of(cell)) if m[1] or m[2]]
            asked = not asks or any(m[1] for m in asks)
        kept.append(
            cell["cell_type"] == "code" and is_core and (asked or "### BEGIN SOLUTION" not in source_of(cell))
        )
    return kept


def with_minutes(path: str | Path) -> str:
    """The notebook's text with the counted minutes in the box at its head."""
    text = Path(path).read_text(encoding="utf-8")
    notebook = json.loads(text)
    head = notebook["cells"][0]
    source = STATED.sub(stated(reading_time(path)), source_of(head), count=1)
    head["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def stated(time: ReadingTime) -> str:
    """The minutes as the box has them: "read 53, the core 31 · exercises 31, the core ones 17"."""
    core = f", the core {time.core}" if time.core != time.reading else ""
    exercises = f" · exercises {time.exercises}" if time.exercises else ""
    ones = f", the core ones {time.core_exercises}" if time.core_exercises != time.exercises else ""
    return f"read {time.reading}{core}{exercises}{ones}"
