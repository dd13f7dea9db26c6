"""What a teacher's copy adds to a lesson: minutes, choices, and the wrong answers that the checks know."""

import ast
import inspect
import re

from nbformat import NotebookNode

from classroom.exercises import has_exercise, read_exercise
from labkit.lab.reading import LEFT_OUT, LINES, WORDS, open_lines

MINUTES = re.compile(r"\((?:[\w ,]*?)(\d+) minutes")


def minutes_table(lesson: NotebookNode) -> str:
    """A table of the lesson's sections: minutes to read, exercises in them, predictions."""
    rows, title = [], "Beginning"
    found = {"words": 0, "lines": 0, "exercises": 0, "minutes": 0, "predictions": 0}
    rows.append([title, found])
    before = ""
    for cell in lesson.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("## "):
                    found = dict.fromkeys(found, 0)
                    rows.append([line[3:], found])
            found["words"] += len(LEFT_OUT.sub("", cell.source).split())
            before = cell.source
        elif has_exercise(cell):
            found["exercises"] += 1
            found["minutes"] += minutes_of(before)
        else:
            found["predictions"] += cell.source.count("lab.predict(")
            found["lines"] += open_lines(cell)
    lines = [
        "**Minutes by section**",
        "",
        "| section | to read | predictions | exercises | their minutes |",
        "|---|---|---|---|---|",
    ]
    total = [0.0, 0, 0, 0]
    for title, found in rows:
        reading = found["words"] / WORDS + found["lines"] / LINES
        counts = [found["predictions"], found["exercises"], found["minutes"]]
        total = [a + b for a, b in zip(total, [reading, *counts])]
        lines.append(f"| {title} | {reading:.0f} | " + " | ".join(str(n or "") for n in counts) + " |")
    lines.append(f"| **together** | **{total[0]:.0f}** | " + " | ".join(f"**{n}**" for n in total[1:]) + " |")
    lines += [
        "",
        f"Text at {WORDS} words per minute, code that is not folded at {LINES} lines.",
    ]
    return "\n".join(lines)


def minutes_of(text: str) -> int:
    """The minutes that the text above an exercise gives; the last, if it gives several."""
    found = MINUTES.findall(text)
    return int(found[-1]) if found else 0


def of_exercise(cell: NotebookNode) -> str:
    """The wrong answers to an exercise that its check names."""
    exercise = read_exercise(cell)
    if not exercise.check:
        return "**For the teacher.** An open experiment: no check; talk about what came out, and why."
    listed = "\n".join(f"- {message}" for message in known_mistakes(exercise.check))
    return f"**For the teacher.** What `{exercise.call}` recognises:\n\n{listed}"


def known_mistakes(check: str) -> list[str]:
    """The messages that a check can give, in its own words."""
    from labkit.lab import check as checks

    function = getattr(checks, check)
    messages: dict[str, None] = {}
    for tree in reachable(function):
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                messages |= dict.fromkeys(said(key) for key in node.keys)
                messages |= dict.fromkeys(said(value) for value in node.values)
            elif isinstance(node, ast.Tuple):
                messages |= dict.fromkeys(said(item) for item in node.elts)
            elif isinstance(node, ast.Assign):
                messages[said(node.value)] = None
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "NotYet":
                messages |= dict.fromkeys(said(argument) for argument in node.args)
    return [message for message in messages if len(message.split()) > 4]


def reachable(function) -> list[ast.AST]:
    """The syntax of a check, and of what it names in its own module."""
    module = inspect.getmodule(function)
    top = {}
    for node in ast.parse(inspect.getsource(module)).body:
        for name in [getattr(node, "name", "")] + [
            t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)
        ]:
            top[name] = node
    wanted, seen = [function.__name__], []
    while wanted:
        name = wanted.pop()
        if name in top and top[name] not in seen:
            seen.append(top[name])
            wanted += [n.id for n in ast.walk(top[name]) if isinstance(n, ast.Name)]
    return seen


def said(node: ast.AST | None) -> str:
    """The text of a string in the source; “…” stands for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return text.removeprefix("…: ")
    return ""


def of_prediction(cell: NotebookNode, cells: list[NotebookNode]) -> str:
    """The choices of a prediction and the right one, as the lesson's outputs have it."""
    if cell.cell_type != "code" or "lab.predict(" not in cell.source:
        return ""
    found = [
        (statement, call)
        for statement in ast.parse(cell.source).body
        for call in ast.walk(statement)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "predict"
    ]
    if not found or len(found[0][1].args) < 2 or not isinstance(found[0][1].args[1], (ast.List, ast.Tuple)):
        return ""
    statement, call = found[0]
    choices = [said(choice) for choice in call.args[1].elts]
    if not all(choices):
        return ""  # computed in the lesson
    name = next((t.id for t in getattr(statement, "targets", []) if isinstance(t, ast.Name)), "prediction")
    below = cells[cells.index(cell) + 1 :]
    revealed = next((c for c in below if c.cell_type == "code" and f"{name}.reveal(" in c.source), None)
    shown = " ".join(
        "".join(output.get("data", {}).get("text/markdown", ""))
        for output in (revealed.outputs if revealed else [])
    )
    right = next((choice for choice in choices if f"**{choice}.**" in shown), "")
    lines = [f"- {choice}" + (" ← right" if choice == right else "") for choice in choices]
    return (
        "**For the teacher.** Ask for hands before you go on, and write the shares on the board:\n\n"
        + "\n".join(lines)
    )
