"""Make data/definitions: dictionary definitions of nouns, and which of six kinds each defines.

    python -m recipes.definitions [--debs FOLDER]

The source is WordNet 3.0, as the Debian 12 package `wordnet-base` has it. Of a noun the file `data.noun` gives the number
of a lexicographer's file (`KINDS`: animals, foods, …), the words, and the definition with its examples. Examples are
left out; nothing else is edited. Definitions that are alike (“genus of herbs of …”) stay: a file of one's own has them, too.
"""

import argparse
import csv
import io
import random
import re
import tempfile
from pathlib import Path

from labkit.files.writing import write_text
from labkit.paths import data_folder
from recipes.debian import unpack

PACKAGE = "wordnet-base"
KINDS = {"05": "animal", "08": "body", "13": "food", "15": "place", "18": "person", "20": "plant"}
EACH, LENGTH, SEED = 120, range(20, 121), 0  # records of a kind; characters of a definition
COLUMNS = ("definition", "kind")


def read(file: Path) -> dict[str, list[str]]:
    """The definitions of each kind, in the file's order, none twice."""
    found: dict[str, dict[str, None]] = {kind: {} for kind in KINDS.values()}
    for line in file.read_text(encoding="latin-1").splitlines():
        head, bar, gloss = line.partition(" | ")
        if line.startswith(" ") or not bar or head.split()[1] not in KINDS:
            continue
        definition = re.split(r';\s*"', gloss)[0].strip()
        if len(definition) in LENGTH and '"' not in definition:
            found[KINDS[head.split()[1]]][definition] = None
    return {kind: list(definitions) for kind, definitions in found.items()}


def drawn(definitions: dict[str, list[str]]) -> list[tuple[str, str]]:
    """`EACH` definitions of every kind, at random, in a random order."""
    draw = random.Random(SEED)
    rows = [(text, kind) for kind, texts in definitions.items() for text in draw.sample(texts, EACH)]
    return draw.sample(rows, len(rows))


def as_csv(rows: list[tuple[str, str]]) -> str:
    """A table with a header, as a spreadsheet writes it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, help=f"a folder with {PACKAGE}_*.deb; default: download it")
    parser.add_argument("--out", type=Path, default=data_folder() / "definitions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, source = unpack(PACKAGE, Path(work), options.debs)
        rows = drawn(read(folder / "usr/share/wordnet/data.noun"))
        licence = (folder / f"usr/share/doc/{PACKAGE}/copyright").read_text(encoding="utf-8")
    print(f"{PACKAGE}: sha256 {source['sha256']}")
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "definitions.csv", as_csv(rows))
    write_text(options.out / "LICENSE.txt", licence)
    print(f"{len(rows)} definitions, {EACH} of each of {', '.join(KINDS.values())}")


if __name__ == "__main__":
    main()
