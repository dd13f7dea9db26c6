"""The text of tiny-llama: five domains with open licences, and a sixth that is never trained on.

    domain      Debian 12 package     licence        one document is   held out
    kjv         bible-kjv-text        public domain  a chapter         whole books
    jargon      jargon-text           public domain  an entry          1 entry in 24
    pydocs      python3.11-doc        PSF            a page            whole pages
    docstrings  libpython3.11-stdlib  PSF            a module          the modules of those pages, and more
    sqlite      sqlite3-doc           public domain  a page            whole pages
    devil       dict-devil            public domain  an entry          everything

It matters that whole documents are held out, not lines: a held-out line between two training lines is easy to
guess. Documents of one domain still share sentences, so any training line of 40 characters or more that also
occurs in held-out text is removed from the training text, and the overlap that is left is measured
(`overlap`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from labkit.files.writing import write_json
from recipes.debian import unpack
from recipes.jsonl import write
from recipes.tiny_llama.sources import Document, devil, docstrings, jargon, kjv, pydocs, sqlite

PACKAGES = (
    "bible-kjv",  # the program that unpacks the text of the next one
    "bible-kjv-text",
    "jargon-text",
    "python3.11-doc",
    "libpython3.11-stdlib",
    "sqlite3-doc",
    "dict-devil",
)
DOMAINS = ("kjv", "jargon", "pydocs", "docstrings", "sqlite")  # trained on
NEW_DOMAIN = "devil"  # never trained on
HELD_OUT_BYTES = {
    "kjv": 55_000,
    "jargon": 40_000,
    "pydocs": 50_000,
    "docstrings": 35_000,
    "sqlite": 40_000,
    "devil": 60_000,
}


def fetch(folder: Path, debs: Path | None = None) -> dict[str, dict[str, str]]:
    """Download the packages (or take them from `debs`) and unpack each into `folder`/NAME.

    Returns:
        for each package, its file name (which has the version) and its sha256.

    Raises:
        RuntimeError: apt-get or dpkg-deb failed, or a package is not in `debs`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {package: unpack(package, folder, debs)[1] for package in PACKAGES}


def normal(line: str) -> str:
    """A line without punctuation and case, by which repeats are found."""
    return re.sub(r"\W+", " ", line).strip().lower()


def collect(folder: Path) -> list[Document]:
    """All documents: held-out text within its budget, training text without lines that are held out."""
    everything = [d for read in (kjv, jargon, pydocs, docstrings, sqlite, devil) for d in read(folder)]
    held_out, size = [], dict.fromkeys(HELD_OUT_BYTES, 0)
    for document in everything:
        length = len(document.text.encode())
        if document.held_out and size[document.domain] + length <= HELD_OUT_BYTES[document.domain]:
            held_out.append(document)
            size[document.domain] += length
    secret = {normal(line) for d in everything if d.held_out for line in d.text.splitlines()}
    secret = {line for line in secret if len(line) >= 40}
    seen: set[str] = set()
    kept = []
    for document in everything:
        if document.held_out:
            continue  # held out beyond the budget is left out of both
        lines = []
        for line in document.text.splitlines():
            key = normal(line)
            if (len(key) >= 40 and key in secret) or (len(key) >= 80 and key in seen):
                continue
            seen.add(key)
            lines.append(line)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
        kept.append(Document(document.domain, document.name, text, False))
    return kept + held_out


def overlap(documents: list[Document], n: int = 12) -> dict[str, float]:
    """For each domain, the share of its held-out runs of n words that also occur in the training text."""
    known = {hash(gram) for d in documents if not d.held_out for gram in grams(d.text, n)}
    shares = {}
    for domain in HELD_OUT_BYTES:
        held = [
            hash(gram) for d in documents if d.held_out and d.domain == domain for gram in grams(d.text, n)
        ]
        shares[domain] = sum(gram in known for gram in held) / max(1, len(held))
    return shares


def grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """The runs of n words in a text."""
    words = normal(text).split()
    return zip(*(words[i:] for i in range(n)), strict=False)


def make(work: Path, debs: Path | None = None) -> list[Document]:
    """The documents, from `work`/corpus.jsonl if they were made before; else fetched, made and kept there."""
    path = work / "corpus.jsonl"
    if not path.exists():
        packages = fetch(work / "packages", debs)
        documents = collect(work / "packages")
        write_json(work / "packages.json", packages, indent=1)
        write(path, [asdict(d) for d in documents])
    return [Document(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
