"""Make from the lessons what a classroom needs: copies for students, copies for teachers, assignments for nbgrader.

    python scripts/make_classroom.py student build/student        # or: make student
    python scripts/make_classroom.py teacher build/teacher        # or: make teacher
    python scripts/make_classroom.py nbgrader build/classroom     # or: make classroom

All of it comes from `notebooks/`, which holds the solutions. A student's notebook that is there already is never
written over: move it away to get a fresh one.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from classroom.assignments import write_course  # noqa: E402
from classroom.copies import write_copies  # noqa: E402

LESSONS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
KINDS = ("student", "teacher", "nbgrader")


def main(kind: str, folder: Path) -> None:
    """Make one kind of copies in `folder`."""
    if kind == "nbgrader":
        write_course(LESSONS, folder)
        print(
            f"{folder}: now run `nbgrader generate_assignment 02_lora_from_scratch` there, or any other lesson"
        )
        return
    written = write_copies(kind, LESSONS, folder)
    kept = len(LESSONS) - len(written)
    print(
        f"{folder}: {len(written)} notebooks written"
        + (f"; {kept} were there, and stay as they are" if kept else "")
    )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: make_classroom.py {{{','.join(KINDS)}}} FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
