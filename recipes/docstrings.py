"""Make data/docstrings: docstrings of Python 3.11's library, labelled by the part that they come from.

    python -m recipes.docstrings [--debs FOLDER]

The source is the Debian 12 package `libpython3.11-stdlib`; its modules are read with `ast`, and nothing is
imported. Whole modules are in train, validation or test, so a sentence that a module repeats cannot be
recognized. A docstring is left out when it names a part of the library (any of `MODULES`: the label would be
a matter of reading a word), when it is shorter than 40 or longer than 500 characters or longer than 180
tokens, and when it is nearly a repeat of another: the one in test is kept first, then the one in validation.

All classes get as many docstrings as the smallest has. Naive Bayes on words shows what the task takes without
a language model.
"""

import argparse
import ast
import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from labkit.data.docstrings import PACKAGES
from labkit.data.passages import tiny_llama_tokens
from labkit.data.splits import SPLITS
from labkit.paths import data_folder
from recipes.debian import unpack
from recipes.jsonl import write

PACKAGE = "libpython3.11-stdlib"
LENGTH = range(40, 501)  # characters
MAX_TOKENS = 180
NEAR = 0.5  # share of runs of three words in common
MODULES = {
    "A": "asyncio",
    "B": "xml",
    "C": "multiprocessing concurrent",
    "D": "unittest doctest pdb bdb trace pstats timeit",
    "E": "mailbox nntplib smtplib ftplib telnetlib imaplib poplib",
    "F": "http socketserver wsgiref xmlrpc webbrowser cgi cgitb html",
    "G": "_pyio tarfile ntpath shutil bz2 gzip lzma fileinput shelve zipapp",
    "H": "_pydecimal statistics numbers fractions",
}
HELD_OUT = {  # modules, and packages up to a dot
    "validation": "asyncio.locks xml.sax.handler xml.dom.pulldom xml.sax._exceptions multiprocessing.connection "
    "unittest.result unittest.suite unittest.util telnetlib http.server webbrowser bz2 gzip lzma statistics",
    "test": "asyncio.transports asyncio.queues asyncio.streams xml.sax.xmlreader xml.sax.saxutils multiprocessing.pool "
    "multiprocessing.shared_memory multiprocessing.heap doctest trace imaplib poplib wsgiref xmlrpc shutil "
    "fileinput numbers fractions",
}


def split_of(module: str) -> str:
    """The split of a module: the one that lists it, or its package, in `HELD_OUT`; else train."""
    for split, names in HELD_OUT.items():
        if any(module == name or module.startswith(name + ".") for name in names.split()):
            return split
    return "train"


def read(root: Path) -> list[dict]:
    """Usable docstrings of functions and classes in `MODULES`: `{"label", "module", "text"}`."""
    label_of = {top: label for label, names in MODULES.items() for top in names.split()}
    given_away = {
        label: re.compile(rf"(?<![a-z])_?(?:{names.replace('_py', '').replace(' ', '|')})", re.I)
        for label, names in MODULES.items()
    }
    found = []
    for path in sorted(p for p in root.rglob("*.py") if p.is_file()):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        label = label_of.get(module.split(".")[0])
        if label is None or re.search(r"\.tests?\b", module):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            text = (ast.get_docstring(node) or "").strip()
            if len(text) not in LENGTH or given_away[label].search(text):
                continue
            if len(tiny_llama_tokens().encode(text).ids) <= MAX_TOKENS:
                found.append({"label": label, "module": module, "text": text})
    return found


def runs(text: str) -> frozenset:
    """All runs of three words; of a shorter text, its words."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(words, words[1:], words[2:])) or frozenset(words)


def without_repeats(rows: list[dict]) -> list[dict]:
    """Leave out every docstring that is nearly an earlier one."""
    kept: list[dict] = []
    seen: list[frozenset] = []
    for row in rows:
        new = runs(row["text"])
        if all(len(new & old) < NEAR * len(new | old) for old in seen):
            kept.append(row)
            seen.append(new)
    return kept


def balanced(rows: list[dict], seed: int) -> list[dict]:
    """As many rows of each label as the rarest has, drawn from its modules in turn, in a random order."""
    draw = random.Random(seed)
    smallest = min(Counter(row["label"] for row in rows).values())
    chosen = []
    for label in PACKAGES:
        by_module = defaultdict(list)
        for row in draw.sample(rows, len(rows)):
            if row["label"] == label:
                by_module[row["module"]].append(row)
        turns = [row for i in range(len(rows)) for group in by_module.values() for row in group[i : i + 1]]
        chosen += turns[:smallest]
    return draw.sample(chosen, len(chosen))


def naive_bayes(train: list[dict], test: list[dict]) -> float:
    """Accuracy of multinomial naive Bayes on lower-case words, with add-one smoothing.

    Source: Manning et al. 2008, section 13.2.
    """
    words: dict[str, Counter[str]] = {label: Counter() for label in PACKAGES}
    for row in train:
        words[row["label"]].update(re.findall(r"[a-z]+", row["text"].lower()))
    vocabulary = set().union(*words.values())
    total = {label: sum(count.values()) + len(vocabulary) for label, count in words.items()}
    prior = Counter(row["label"] for row in train)

    def score(label: str, text: str) -> float:
        known = [word for word in re.findall(r"[a-z]+", text.lower()) if word in vocabulary]
        return math.log(prior[label]) + sum(
            math.log((words[label][word] + 1) / total[label]) for word in known
        )

    best = [max(PACKAGES, key=lambda label: score(label, row["text"])) for row in test]
    return sum(guess == row["label"] for guess, row in zip(best, test)) / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, help=f"a folder with {PACKAGE}_*.deb; default: download it")
    parser.add_argument("--out", type=Path, default=data_folder() / "docstrings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, source = unpack(PACKAGE, Path(work), options.debs)
        rows = read(folder / "usr/lib/python3.11")
    print(f"{PACKAGE}: sha256 {source['sha256']}")
    rows.sort(key=lambda row: SPLITS[::-1].index(split_of(row["module"])))
    rows = without_repeats(rows)
    splits = {
        split: balanced([row for row in rows if split_of(row["module"]) == split], seed=0) for split in SPLITS
    }
    for split, chosen in splits.items():
        write(options.out / f"{split}.jsonl", chosen)
        each = len(chosen) // len(PACKAGES)
        print(
            f"{split}: {len(chosen)} docstrings, {each} of each class, {len({r['module'] for r in chosen})} modules"
        )
    for split in SPLITS[1:]:
        print(f"naive Bayes on {split}: {naive_bayes(splits['train'], splits[split]):.1%}")


if __name__ == "__main__":
    main()
