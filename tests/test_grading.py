"""nbgrader's round trip on a real lesson, with students who are good, idle, wrong, unlucky and hostile."""

import copy
import getpass
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from html import unescape
from pathlib import Path

import nbformat
import pytest

from labkit.lab.sandbox import landlock_version

ROOT = Path(__file__).resolve().parent.parent
runpy.run_path(str(ROOT / "scripts" / "make_classroom.py"))  # puts scripts/ on the path

from classroom import assignments, exercises  # noqa: E402

LESSON = "00_start_here"
GOOD = getpass.getuser()  # who submits by way of the exchange
SOLUTIONS = {
    "weight_bytes": "return parameters * bits / 8",
    "training_flops": "return (4 if frozen else 6) * weights * tokens",
    "greedy_token": "return int(logits[-1].argmax())",
}
HOSTILE = {
    "weight_bytes": """
import pathlib
for place in (OUTSIDE, HOME):
    try:
        (pathlib.Path(place) / "hostile").write_text("here")
    except OSError as error:
        print("writing:", type(error).__name__)
for place in (SOURCE, GRADES, LESSON):
    try:
        print("read", len(pathlib.Path(place).read_bytes()))
    except OSError as error:
        print("reading:", type(error).__name__)
def weight_bytes(parameters, bits):
    while True:
        pass
""",
    "training_flops": """
def training_flops(weights, tokens, frozen):
    import numpy
    return len(numpy.ones(2**28))
""",
    "greedy_token": """
import labkit.lab.check.compare as compare
compare.same = lambda *_: True
lab.check.greedy_token = lambda function: None
def greedy_token(logits):
    return 7
""",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("nbgrader") is None,
        reason="nbgrader is not installed here: grading was NOT tested (make classroom installs it)",
    ),
    pytest.mark.skipif(not landlock_version(), reason="no Landlock here: limits on files were NOT tested"),
]


COMMANDS = """
import json, os, sys
from nbgrader.apps.nbgraderapp import NbGraderApp  # for two seconds

for folder, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.argv = ["nbgrader", *arguments]
        sys.exit(NbGraderApp.launch_instance())
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"nbgrader {arguments} ended with {code}")
"""


def nbgrader(base: Path, *commands: tuple[Path, str, *tuple[str, ...]]) -> None:
    """Run commands of nbgrader, each in its folder and in a process of its own, for a class below `base`."""
    bin_folder = str(Path(sys.executable).parent)  # it calls alembic by name
    paths = {
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JUPYTER_CONFIG_DIR": str(base / "config"),
        "JUPYTER_DATA_DIR": str(base / "data"),
    }
    exchange = ["--Exchange.root", str(base / "exchange"), "--course", "labkit"]
    with_exchange = ("release_assignment", "fetch_assignment", "submit", "collect")
    given = [
        (str(folder), [*arguments, *(exchange if arguments[0] in with_exchange else [])])
        for folder, *arguments in commands
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(given)],
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


def filled(release, answers: dict[str, str]):
    """A copy of the released notebook with these bodies, or whole cells where they are several lines."""
    mine = copy.deepcopy(release)
    for cell in mine.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in answers:
            whole = "\n" in answers[name]
            cell.source = answers[name] if whole else cell.source.replace(exercises.STUB, answers[name])
    return mine


def broken(release):
    """A syntax error, an exercise deleted, a function renamed, and another language's kernel."""
    mine = filled(release, {"weight_bytes": "def weight_bytes(parameters, bits:\n    return 1"})
    mine.cells = [
        c for c in mine.cells if "training_flops" not in c.metadata.get("nbgrader", {}).get("grade_id", "")
    ]
    for cell in mine.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "greedy_token":
            cell.source = cell.source.replace("greedy_token", "my_token")
    mine.metadata["kernelspec"] = {"name": "julia-1.9", "display_name": "Julia", "language": "julia"}
    return mine


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A course folder with five submissions graded, and their feedback."""
    base = tmp_path_factory.mktemp("classroom")
    folder, student = base / "course", base / "student"
    for place in (folder, student, base / "exchange", base / "outside"):
        place.mkdir()
    (base / "exchange").chmod(0o777)
    assignments.write_course([ROOT / "notebooks" / f"{LESSON}.ipynb"], folder)
    nbgrader(
        base,
        (folder, "generate_assignment", LESSON),
        (folder, "release_assignment", LESSON),
        (student, "fetch_assignment", LESSON),
    )
    path = student / LESSON / f"{LESSON}.ipynb"
    release = nbformat.read(path, 4)
    nbformat.write(filled(release, SOLUTIONS), path)
    places = {
        "OUTSIDE": str(base / "outside"),
        "HOME": str(Path.home()),
        "SOURCE": str(folder / "source" / LESSON / f"{LESSON}.ipynb"),
        "GRADES": str(folder / "gradebook.db"),
        "LESSON": str(ROOT / "notebooks" / f"{LESSON}.ipynb"),
    }
    given = "".join(f"{name} = {value!r}\n" for name, value in places.items())
    others = {
        "empty": release,
        "wrong": filled(release, SOLUTIONS | {"weight_bytes": "return parameters * bits"}),
        "broken": broken(release),
        "hostile": filled(release, HOSTILE | {"weight_bytes": given + HOSTILE["weight_bytes"]}),
    }
    for name, notebook in others.items():
        place = folder / "submitted" / name / LESSON
        place.mkdir(parents=True)
        nbformat.write(notebook, place / f"{LESSON}.ipynb")
    # the kernel has imported all that the cells do, so each takes milliseconds but the one that never ends
    nbgrader(
        base,
        (student, "submit", LESSON),
        (folder, "collect", LESSON),
        (folder, "autograde", LESSON, "--ExecutePreprocessor.timeout=8"),
        (folder, "generate_feedback", LESSON),
    )
    return folder


def feedback(course: Path, name: str) -> str:
    page = (course / "feedback" / name / LESSON / f"{LESSON}.html").read_text(encoding="utf-8")
    return unescape(re.sub(r"<[^>]+>", "", page))


def points(course: Path, name: str) -> dict[str, float]:
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "labkit") as book:
        submission = book.find_submission_notebook(LESSON, LESSON, name)
        return {grade.name.removesuffix("-check"): grade.score for grade in submission.grades}


def test_a_release_holds_stubs_and_no_solution(course):
    text = (course / "release" / LESSON / f"{LESSON}.ipynb").read_text()
    assert text.count("raise NotImplementedError") == 3 and not any(
        line in text for line in SOLUTIONS.values()
    )


def test_the_five_get_the_points_that_they_earned(course):
    names = list(SOLUTIONS)
    assert points(course, GOOD) == dict.fromkeys(names, 1.0)
    assert points(course, "empty") == dict.fromkeys(names, 0.0)
    assert points(course, "wrong") == dict.fromkeys(names, 1.0) | {"weight_bytes": 0.0}
    assert points(course, "broken") == dict.fromkeys(names, 0.0)
    assert points(course, "hostile") == dict.fromkeys(names, 0.0)


def test_feedback_says_what_was_wrong_and_gives_no_solution_away(course):
    said = {name: feedback(course, name) for name in ("empty", "wrong", "broken", "hostile")}
    assert said["empty"].count("has the stub been filled in?") == 3
    assert "Not yet. weight_bytes: that is bits; there are eight to a byte" in said["wrong"]
    assert "SyntaxError" in said["broken"] and "NameError" in said["broken"]
    own = {"wrong": set(SOLUTIONS) - {"weight_bytes"}}
    for name, text in said.items():
        for exercise, line in SOLUTIONS.items():
            if exercise not in own.get(name, ()):
                formula = line.removeprefix("return ")
                assert line not in text and f": {formula}" not in text, (name, exercise)


def test_a_hostile_notebook_is_stopped_and_harms_nothing(course):
    said = feedback(course, "hostile")
    assert "Stopped. weight_bytes: your function was still running" in said
    assert "your function raised MemoryError" in said or "ArrayMemoryError" in said
    assert "this notebook changes" in said and "labkit.lab.check" in said
    assert said.count("writing: PermissionError") == 2 and said.count("reading: PermissionError") == 3
    assert not list((course.parent / "outside").iterdir()) and not (Path.home() / "hostile").exists()


def test_nothing_that_was_handed_in_is_lost(course):
    for name in ("broken", "hostile"):
        handed_in = course / "submitted" / name / LESSON / f"{LESSON}.ipynb"
        assert "hostile" in handed_in.read_text() or "my_token" in handed_in.read_text()
