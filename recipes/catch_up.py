"""Record the slow calls of lessons, so that `lab.catch_up` can play them: `make catch-up` (into the cache, minutes).

    python -m recipes.catch_up 02 08                     # into the cache of this machine, all weights
    python -m recipes.catch_up --to data/catch_up 02     # what is committed: only small files

Each lesson runs as far as its last cell that trains or generates. In `data/catch_up` weights are in fp16, and only of
runs whose file stays below 1 MB; `SHA256SUMS` holds what belongs together.
"""

import argparse
import os
from pathlib import Path

from labkit.files import sha256, write_text
from labkit.lab.catching_up import find_lesson, quietly, read_lesson
from labkit.lab.tapes import Recorder, in_place_of_slow_calls
from labkit.paths import CHECKOUT, cache_folder

LESSONS = ("02", "03", "08", "12")
SMALL, ANY = 10**6, 10**9


def record(lesson: str, folder: Path, at_most: int) -> None:
    """Run a lesson's cells, and write a tape for each that calls something slow."""
    path = find_lesson(lesson)
    cells = read_lesson(path)
    slow = [
        n
        for n, cell in enumerate(cells)
        if any(f"{call}(" in cell.source for call in ("train", "generate", "generate_shared"))
    ]
    namespace: dict = {"__name__": "__main__"}
    for cell in cells[: max(slow, default=-1) + 1]:
        recorder = Recorder()
        with quietly(), in_place_of_slow_calls(namespace, recorder.make):
            exec(compile(cell.source, f"<{path.stem}, {cell.name}>", "exec"), namespace)
        if recorder.calls:
            size = recorder.write(folder / path.stem / f"{cell.name}.json", cell.source, at_most)
            print(f"{path.stem} {cell.name}: {len(recorder.calls)} calls, {size / 1e3:.0f} kB", flush=True)


def write_sums(folder: Path) -> None:
    """The checksums of all tapes in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    write_text(
        folder / "SHA256SUMS", "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lessons", nargs="*", default=list(LESSONS))
    parser.add_argument("--to", type=Path, help="default: the cache")
    options = parser.parse_args()
    os.environ["LABKIT_STATIC"] = "yes"
    folder = options.to or cache_folder() / "catch_up"
    os.chdir(CHECKOUT / "notebooks")
    folder = CHECKOUT / folder
    for lesson in options.lessons:
        record(lesson, folder, SMALL if options.to else ANY)
    write_sums(folder)


if __name__ == "__main__":
    main()
