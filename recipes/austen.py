"""Make data/austen: passages of Jane Austen's six novels, split by whole novels.

    python -m recipes.austen [--debs FOLDER]

The text comes from the Debian 12 package `r-cran-janeaustenr`, which holds the novels as Project Gutenberg
published them, in a database of R: an index (`Rdata.rdx`: name -> offset, length) and serialized objects
(`Rdata.rdb`), each 4 bytes of length and then zlib. The library `rdata` reads R's serialization. Only this
recipe needs it, not the data: `pip install rdata==1.1.0`.

The four longest novels are for training; a sample of each fills the budget in equal parts, so no single plot
dominates. The two shortest are held out; each is still several times as long as its split needs. Northanger
Abbey is the test, because its typography is that of the training novels; Persuasion writes “Mr Elliot”
without the full stop, which would be tested too.
"""

import argparse
import random
import re
import tempfile
import zlib
from pathlib import Path

from labkit.data.passages import cut_passages
from labkit.paths import data_folder
from recipes.debian import unpack
from recipes.jsonl import write

PACKAGE = "r-cran-janeaustenr"
SPLIT = {  # novels, and bytes of text to take from each
    "train": (("emma", "mansfieldpark", "prideprejudice", "sensesensibility"), 150_000),
    "validation": (("persuasion",), 30_000),
    "test": (("northangerabbey",), 60_000),
}
TITLES = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}
HEADING = re.compile(r"(?:chapter|volume) (?:[ivxlc]+|\d+)", re.I)
END = re.compile(r"finis|the end|a note on the text", re.I)
EDITOR = re.compile(r"[\[(](?:End (?:of )?volume|At this point in the first)|\*Vide |[* ]+$")


def read_novels(folder: Path) -> dict[str, list[str]]:
    """The lines of each novel.

    Raises:
        RuntimeError: the library `rdata` is not installed.
    """
    try:
        from rdata.conversion import convert  # type: ignore[import-not-found]
        from rdata.parser import parse_data  # type: ignore[import-not-found]
    except ImportError:
        raise RuntimeError("this recipe reads R's files with rdata: pip install rdata==1.1.0") from None
    base = folder / "usr/lib/R/site-library/janeaustenr/data"
    index = convert(parse_data((base / "Rdata.rdx").read_bytes(), extension=".rds"))["variables"]
    data = (base / "Rdata.rdb").read_bytes()
    return {
        str(name): [
            str(line)
            for line in convert(parse_data(zlib.decompress(data[at + 4 : at + size]), extension=".rds"))
        ]
        for name, (at, size) in index.items()
    }


def paragraphs(lines: list[str]) -> list[str]:
    """Whole paragraphs between the first chapter heading and the end, without headings and editors' notes.

    The lines of a paragraph are joined; those of verse and of letters' heads, which are indented, keep their
    breaks. Underscores, which stand for italics, are removed.
    """
    first = next(i for i, line in enumerate(lines) if HEADING.fullmatch(line.strip()))
    last = next((i for i, line in enumerate(lines) if END.fullmatch(line.strip())), len(lines))
    found = []
    for block in re.split(r"\n\s*\n", "\n".join(lines[first:last])):
        if not block.strip() or HEADING.fullmatch(block.strip()) or EDITOR.match(block.strip()):
            continue
        block = block.strip("\n").replace("_", "")
        if re.search(r"^\s", block, re.M):
            found.append("\n".join(re.sub(r"\s+", " ", line).strip() for line in block.splitlines()))
        else:
            found.append(re.sub(r"\s+", " ", block.replace("--\n", "--")).strip())
    return found


def sample(texts: list[str], budget: int, seed: int) -> list[str]:
    """Passages in a random order, as many as fit into `budget` bytes."""
    order = random.Random(seed).sample(texts, len(texts))
    taken, size = [], 0
    for text in order:
        size += len(text.encode())
        if size > budget:
            break
        taken.append(text)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, help=f"a folder with {PACKAGE}_*.deb; default: download it")
    parser.add_argument("--out", type=Path, default=data_folder() / "austen")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, source = unpack(PACKAGE, Path(work), options.debs)
        novels = read_novels(folder)
    print(f"{PACKAGE}: sha256 {source['sha256']}")
    for split, (names, budget) in SPLIT.items():
        rows = [
            {"novel": TITLES[name], "text": text}
            for name in names
            for text in sample(cut_passages("\n\n".join(paragraphs(novels[name]))), budget, seed=0)
        ]
        random.Random(1).shuffle(rows)
        write(options.out / f"{split}.jsonl", rows)
        size = sum(len(row["text"].encode()) for row in rows)
        print(f"{split}: {len(rows)} passages, {size:,} bytes, from {', '.join(TITLES[n] for n in names)}")


if __name__ == "__main__":
    main()
