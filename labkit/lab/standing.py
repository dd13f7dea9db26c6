"""`lab.progress()`: a table of what has been done, lesson by lesson; `lab.forget_progress()` deletes it."""

import functools
import json
import re
from html import escape
from pathlib import Path

from IPython.display import HTML, Markdown, display

from labkit.lab import diary
from labkit.paths import CHECKOUT, person_folder

NOT_KEPT = (
    "*Your progress shows here when you work through the course: predictions, exercises, minutes. "
    "It is kept on this machine only. This page was made without a reader.*"
)
RULE = "border-bottom:1px solid rgba(128,128,128,.35);padding:.3em .9em .3em 0;text-align:left;vertical-align:top"
TRACK = "display:inline-block;width:6em;height:.6em;background:rgba(128,128,128,.25);border-radius:.3em;margin-right:.5em"
FILL = "display:block;height:100%;border-radius:.3em;background:"  # then a colour that is seen on white and on black


def progress(person: str | None = None) -> None:
    """Show what has been done so far.

    Args:
        person: who works here from now on, where two people share an account; LABKIT_PERSON does the same.

    Raises:
        ValueError: not a name.
    """
    if not diary.is_kept():
        display(Markdown(NOT_KEPT))
        return
    if person is not None:
        diary.choose(person)
    diary.flush()
    with diary.locked():
        found, said = diary.read_or_put_aside(diary.person())
    if said:
        print(said)
    display(HTML(table(found)))


def forget_progress(person: str | None = None) -> None:
    """Delete the record of a person, or of whoever works here. There is no way back."""
    name = diary.check_name(person) if person is not None else diary.person()
    there = diary.forget(name)
    print(
        f"The record of {name}'s progress is deleted."
        if there
        else f"There is no record of {name}'s progress."
    )


def table(found: dict) -> str:
    """The record as HTML: colours are the page's own, so that it can be read on a light and on a dark one."""
    rows = []
    for lesson in sorted(set(course()) | set(found["lessons"])):
        part = found["lessons"].get(lesson, {"minutes": 0, "predictions": {}, "exercises": {}})
        n_predictions, n_exercises = course().get(lesson, (0, 0))
        right = sum(p["right"] for p in part["predictions"].values())
        passed = sum(e["passed"] for e in part["exercises"].values())
        done = len(part["predictions"])
        of_done = f"{right} right of {done} made" if done else "–"
        cells = [
            f"<code>{escape(lesson)}</code>{details(part)}",
            bar(right, n_predictions, "#3a86c8", of_done),
            bar(passed, n_exercises, "#2a9d6f", f"{passed} of {max(n_exercises, passed)}"),
            f"{part['minutes']:.0f}" if part["minutes"] else "–",
        ]
        rows.append(
            "<tr style='background:none'>" + "".join(f"<td style='{RULE}'>{c}</td>" for c in cells) + "</tr>"
        )
    heads = "".join(
        f"<th style='{RULE}'>{h}</th>" for h in ("lesson", "predictions", "exercises solved", "minutes")
    )
    where = f"Kept in <code>{escape(str(short(person_folder())))}</code> on this machine and nowhere else. "
    where += '<code>lab.progress("Ada")</code> if somebody else works here; <code>lab.forget_progress()</code> deletes it.'
    return (
        f"<p><b>{escape(found['person'])}</b></p><table style='border-collapse:collapse;font-size:1em'>"
        f"<tr style='background:none'>{heads}</tr>{''.join(rows)}</table><p style='opacity:.75'>{where}</p>"
    )


def details(part: dict) -> str:
    """Which predictions and exercises, folded."""
    lines = [
        f"{'✓' if p['right'] else '✗'} {escape(question)} <i>{escape(p['choice'])}</i>"
        for question, p in part["predictions"].items()
    ]
    lines += [
        f"{'✓' if e['passed'] else '○'} <code>{escape(name)}</code>, {e['tries']} {'try' if e['tries'] == 1 else 'tries'}"
        for name, e in part["exercises"].items()
    ]
    if not lines:
        return ""
    return f"<details><summary style='opacity:.75'>which</summary>{'<br>'.join(lines)}</details>"


def bar(part: int, whole: int, colour: str, text: str) -> str:
    """A bar, filled as far as `part` of `whole`, with a text at its right."""
    share = min(1.0, part / whole) if whole else 0.0
    fill = f"<span style='{FILL}{colour};width:{share:.0%}'></span>"
    return f"<span style='white-space:nowrap'><span style='{TRACK}'>{fill}</span>{text}</span>"


def short(path: Path) -> Path:
    """The path with `~` for the home folder."""
    try:
        return Path("~") / path.relative_to(Path.home())
    except (ValueError, RuntimeError):
        return path


@functools.cache
def course() -> dict[str, tuple[int, int]]:
    """{lesson: (predictions, exercises)} of the notebooks beside this package; {} without them."""
    counted = {}
    for path in sorted((CHECKOUT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        solved = set(re.findall(r"^(?:lab\.)?check\.(\w+)\(", code, re.M))
        counted[path.stem] = (len(re.findall(r"\blab\.predict\(", code)), len(solved))
    return counted
