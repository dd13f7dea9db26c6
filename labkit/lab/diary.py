"""What one person has done in the course: a small JSON file on this machine, and nowhere else.

    {"format": 1, "person": "Ada", "lessons": {"02_lora_from_scratch": {"minutes": 31.5,
        "predictions": {question: {"choice": …, "right": …}}, "exercises": {name: {"passed": …, "tries": …}}}}}

Predictions and exercise checks note themselves (`note`), where somebody is there to answer: not headless, not in a
test, not with LABKIT_PROGRESS=no. Two people on one account are two names: LABKIT_PERSON, or `lab.progress("Ada")`.
The first answer to a prediction counts, and an exercise that passed once has passed.

Kernels write at the same time, so each change is read, made and written under a lock. A file that cannot be read is
put aside, never written over. What cannot be written now is written with the next note: a lesson never fails for it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from labkit.files import InUse, only_one, read_json, write_json
from labkit.hardware import switch
from labkit.lab.cells import find_notebook
from labkit.lab.interactive import has_reader, running_kernel
from labkit.paths import person_folder

FORMAT, NOBODY = 1, "me"
MAX_NAME, MAX_TEXT, MAX_ENTRIES, MAX_BYTES = 60, 300, 400, 2**20
PAUSE = 5.0  # minutes without a cell that count as reading; what is longer is a break
Change = Callable[[dict], None]


class Newer(ValueError):
    """The file was written by a later version of labkit."""


@dataclass
class Kernel:
    """What this process knows: who works in it, what is still to be written, when the last cell ran."""

    person: str | None = None
    waiting: list[Change] = field(default_factory=list)
    told: bool = False
    last_cell: float | None = None
    minutes: float = 0.0


_kernel = Kernel()


def is_kept() -> bool:
    """Is anything noted here? LABKIT_PROGRESS says so, or else that somebody is there.

    Raises:
        ValueError: LABKIT_PROGRESS is neither yes nor no.
    """
    wanted = switch("LABKIT_PROGRESS", None)
    return has_reader() if wanted is None else wanted


def person() -> str:
    """Who works here: LABKIT_PERSON, or the last name given to `lab.progress` when this kernel first asked."""
    if _kernel.person is None:
        _kernel.person = os.environ.get("LABKIT_PERSON", "").strip() or last_person()
    return check_name(_kernel.person)


def choose(name: str) -> None:
    """From now on `name` works here, and in kernels that start later."""
    flush()
    _kernel.person = check_name(name)
    write_json(person_folder() / "last.json", {"person": _kernel.person})


def last_person() -> str:
    """The name that was chosen last on this account."""
    try:
        found = read_json(person_folder() / "last.json", 4096)
        return check_name(found["person"])  # type: ignore[index]
    except (OSError, ValueError, KeyError, TypeError):
        return NOBODY


def check_name(name: object) -> str:
    """`name` without white space around it.

    Raises:
        ValueError: empty, too long, or not printable.
    """
    if (
        not isinstance(name, str)
        or not name.strip()
        or len(name.strip()) > MAX_NAME
        or not name.isprintable()
    ):
        raise ValueError(
            f"a person's name is 1 to {MAX_NAME} letters, got {name!r}; set LABKIT_PERSON to one"
        )
    return name.strip()


def file_of(name: str) -> Path:
    """The file of a person; "Ada" and "ada" are one, and no name leads out of the folder."""
    return person_folder() / f"person-{quote(name.casefold(), safe=' ').replace('.', '%2E')}.json"


def read(name: str) -> dict:
    """What `name` has done, or an empty diary.

    Raises:
        Newer: of a later version.
        ValueError: damaged.
    """
    path = file_of(name)
    try:
        found = read_json(path, MAX_BYTES)
    except FileNotFoundError:
        return {"format": FORMAT, "person": name, "lessons": {}}
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise Newer(f"{path} was written by a later version of labkit; it stays as it is")
    check_shape(path, found)
    return found  # type: ignore[return-value]


def check_shape(path: Path, found: Any) -> None:
    """Raise a `ValueError` unless it is a diary: what is read is shown as HTML and added to."""
    try:
        fits = found["format"] == FORMAT and isinstance(found["person"], str)
        for lesson in found["lessons"].values():
            fits &= isinstance(lesson["minutes"], (int, float)) and 0 <= lesson["minutes"] < 1e6
            fits &= all(
                isinstance(p["right"], bool) and isinstance(p["choice"], str)
                for p in lesson["predictions"].values()
            )
            fits &= all(
                isinstance(e["passed"], bool) and isinstance(e["tries"], int)
                for e in lesson["exercises"].values()
            )
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is JSON, but not a record of progress")


def read_or_put_aside(name: str) -> tuple[dict, str]:
    """What `name` has done, and what there is to say: a damaged file is renamed, and kept."""
    try:
        return read(name), ""
    except Newer:
        raise
    except ValueError as error:
        path, n = file_of(name), 1
        while (aside := path.with_name(f"{path.stem}.damaged-{n}.json")).exists():
            n += 1
        os.replace(path, aside)
        said = f"The record of {name}'s progress could not be read ({error}). It is kept as {aside}; a new one begins."
        return read(name), said


def note(change: Change) -> None:
    """Apply `change` to this lesson's part of the diary, now or with the next note; never raises, whatever the disk does."""
    try:
        if not is_kept():
            return
        lesson, who = lesson_name(), person()
        _kernel.waiting.append(lambda diary: change(part_of(diary, lesson)))
        said = write(who)
    except (OSError, ValueError, InUse) as error:
        said = "" if _kernel.told else f"Your progress is not noted for now: {error}"
        _kernel.told = True
    if said:
        print(said)


def write(who: str) -> str:
    """Write what waits; gives what there is to say."""
    with locked():
        diary, said = read_or_put_aside(who)
        for change in _kernel.waiting:
            change(diary)
        write_json(file_of(who), diary)
    _kernel.waiting.clear()
    return said


def locked():
    """The lock that all who change a diary on this account hold."""
    return only_one(person_folder() / "lock", "another notebook is writing to it", wait=5)


def part_of(diary: dict, lesson: str) -> dict:
    """The part of one lesson."""
    empty: dict = {"minutes": 0.0, "predictions": {}, "exercises": {}}
    return diary["lessons"].setdefault(lesson[:MAX_TEXT], empty)


def note_prediction(question: str, choice: str, right: bool) -> None:
    """The reader chose `choice` before the answer was shown."""

    def change(part: dict) -> None:
        if len(part["predictions"]) < MAX_ENTRIES:
            part["predictions"].setdefault(question[:MAX_TEXT], {"choice": choice[:MAX_TEXT], "right": right})

    note(change)


def note_exercise(name: str, passed: bool) -> None:
    """A check of an exercise was run."""

    def change(part: dict) -> None:
        if name in part["exercises"] or len(part["exercises"]) < MAX_ENTRIES:
            before = part["exercises"].get(name, {"passed": False, "tries": 0})
            tries = before["tries"] + (not before["passed"])
            part["exercises"][name] = {"passed": passed or before["passed"], "tries": tries}

    note(change)


def forget(name: str) -> bool:
    """Delete what is known of `name`; False if there was nothing."""
    with locked():
        _kernel.waiting.clear()
        _kernel.minutes = 0.0
        path = file_of(name)
        there = path.exists()
        path.unlink(missing_ok=True)
    return there


def lesson_name() -> str:
    """The notebook that runs, without its ending."""
    kernel = running_kernel()
    path = find_notebook(getattr(getattr(kernel, "shell", None), "user_ns", {}))
    return path.stem if path else "a notebook without a name"


def flush() -> None:
    """Write the minutes so far."""
    if _kernel.minutes:
        minutes, _kernel.minutes = _kernel.minutes, 0.0
        note(lambda part: part.update(minutes=round(part["minutes"] + minutes, 2)))


def tick(*_: object) -> None:
    """A cell begins: the time since the last one is time in this lesson, unless it was a break."""
    now = time.monotonic() / 60
    if _kernel.last_cell is not None:
        _kernel.minutes += min(now - _kernel.last_cell, PAUSE)
    _kernel.last_cell = now
    if _kernel.minutes >= 1:
        flush()


def keep_time() -> None:
    """In a notebook: count minutes from now on."""
    shell = getattr(running_kernel(), "shell", None)
    if shell is not None:
        shell.events.register("pre_run_cell", tick)
