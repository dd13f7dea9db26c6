"""The record of rollouts: one file of JSON lines for each alias, beside the registry, which is only ever added to.

    rollouts/support@production.jsonl      start, answer, score, pair, decision, settled
    rollouts/drift.jsonl                   alarms

A line is written before what it says takes effect. A trial is made anew from its lines, so that a killed server goes on
where it was. A last line that the kill cut off had no effect; it is put aside. Users stand there as hashes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.files.reading import read_json_lines
from labkit.serving.assignment import person_of
from labkit.serving.naming import read_alias
from labkit.sweeps.records import MAX_BYTES

FOLDER, DRIFT, SUFFIX = "rollouts", "drift.jsonl", ".jsonl"


def log_of(root: Path, alias: str) -> Path:
    """The file of an alias."""
    return root / FOLDER / f"{read_alias(alias)}{SUFFIX}"


def logs(root: Path) -> list[Path]:
    """The files of all aliases that ever had a trial."""
    return sorted(path for path in (root / FOLDER).glob(f"*@*{SUFFIX}"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, the first one first, without a last one that is not whole; none if there is no file.

    Raises:
        ValueError: a line is damaged; says which file.
    """
    if not path.exists():
        return []
    return read_json_lines(path, MAX_BYTES, unfinished=False)


def of_last_trial(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the trial that began last."""
    starts = [index for index, line in enumerate(lines) if line["kind"] == "start"]
    return lines[starts[-1] :] if starts else []


def explain(root: Path, answer: str) -> str:
    """What answer `answer` of a trial was written by, and why; what was found of it, and how the trial ended.

    Args:
        root: of the registry.
        answer: the id that the client got.

    Raises:
        LookupError: it was given outside every trial; the history of its alias says what served it.
    """
    for path in logs(root):
        lines = read_log(path)
        for line in lines:
            if line["kind"] == "answer" and line["answer"] == answer and not line["is_shadow"]:
                return "\n".join(story(line, [one for one in lines if one["trial"] == line["trial"]]))
    raise LookupError(
        f"no trial gave an answer {answer[:100]!r}; python -m labkit.registry at TIME says which version served"
    )


def story(given: dict[str, Any], lines: list[dict[str, Any]]) -> Iterator[str]:
    """What is known of an answer, one sentence a line."""
    start = lines[0]
    yield f"{given['at']} {given['answer']}: {given['version']} wrote it ({given['outcome']}), for person {given['person']}"
    yield f"why: {given['why']}"
    yield (
        f"the trial: v{start['candidate']} against v{start['control']} of {start['alias']}, {start['mode']}, "
        f"since {start['at']}, by {start['author'] or 'nobody named'}: {start['note'] or 'no note'}"
    )
    for line in lines:
        counted = "counted" if line.get("counted") else "not counted"
        if line.get("answer") == given["answer"] and line["kind"] == "answer" and line["is_shadow"]:
            yield f"{line['at']} {line['version']} wrote one that was not sent ({line['outcome']})"
        elif line.get("answer") == given["answer"] and line["kind"] == "score":
            yield f"{line['at']} score {line['score']:g} by {line['by']}, {counted}"
        elif line.get("answer") == given["answer"] and line["kind"] == "pair":
            yield f"{line['at']} control {line['control']:g}, candidate {line['candidate']:g}, {counted}"
        elif line["kind"] == "decision":
            yield f"{line['at']} {line['verdict']}: {line['reason']}"


def answers_of(root: Path, user: str) -> list[dict[str, Any]]:
    """The lines of all answers that trials gave to a user, by the name that came with the requests."""
    found: list[dict[str, Any]] = []
    for path in logs(root):
        lines = read_log(path)
        persons = {line["trial"]: person_of(user, line["trial"]) for line in lines if line["kind"] == "start"}
        found += [
            line for line in lines if line["kind"] == "answer" and line["person"] == persons[line["trial"]]
        ]
    return found
