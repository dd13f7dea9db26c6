"""Record the slow calls of lessons, so that `lab.catch_up` can play them: `make catch-up` (into the cache, minutes).

    python -m recipes.catch_up 02 08                     # into the cache of this machine, all weights
    python -m recipes.catch_up --to data/catch_up 02     # what is committed: only small files

Of each lesson run the cells that train or generate for a later section, and what they need. In `data/catch_up` weights are in fp16, and only of
runs whose file stays below 1 MB; `SHA256SUMS` holds what belongs together.
"""

import argparse
import os
from pathlib import Path

from labkit.files import sha256, write_text
from labkit.lab.catching_up import Cell, code_of, find_lesson, quietly, read_lesson
from labkit.lab.slicing import needed_cells
from labkit.lab.tapes import Recorder, in_place_of_slow_calls
from labkit.paths import CHECKOUT, cache_folder

LESSONS = ("02", "03", "08", "12")
SHIPPED = {"08": "adapters/tickets"}  # a longer run's, in place of four minutes of training and 20 MB
SMALL, ANY = 10**6, 10**9
SLOW = ("labkit.train(", "evaluate.generate(", "generate_shared(")


def cells_to_run(cells: list[Cell]) -> tuple[list[int], set[int]]:
    """The cells to run, and those of them to record: slow ones that a later section needs, and what they need."""
    sources = [cell.source for cell in cells]
    wanted: set[int] = set()
    for name in dict.fromkeys(cell.section for cell in cells[1:]):
        numbers = [n for n, cell in enumerate(cells) if cell.section == name]
        wanted |= set(needed_cells(sources[: numbers[0]], sources[numbers[0] : numbers[-1] + 1]))
    slow = {n for n in wanted if any(call in sources[n] for call in SLOW)}
    return sorted(slow.union(*(needed_cells(sources[:n], [sources[n]]) for n in slow if n))), slow


def record(lesson: str, folder: Path, at_most: int) -> None:
    """Run what is needed of a lesson, and write a tape for each slow cell."""
    path = find_lesson(lesson)
    cells = read_lesson(path)
    run, slow = cells_to_run(cells)
    namespace: dict = {"__name__": "__main__"}
    for n in run:
        cell = cells[n]
        recorder = Recorder(SHIPPED.get(lesson))
        with quietly(), in_place_of_slow_calls(namespace, recorder.make):
            exec(code_of(cell, path.stem), namespace)
        if recorder.calls and n in slow:
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
