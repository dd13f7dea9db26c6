"""The text of tiny-llama: five domains with open licences, split by whole documents, and a sixth that is never trained on.

All of it comes from Debian 12 packages, fetched with `apt-get download` (no root, nothing is installed) and unpacked
with `dpkg-deb -x`, so that a licence file and a checksum come with every source:

    kjv          bible-kjv-text     public domain   a document is a chapter     held out: whole books
    jargon       jargon-text        public domain   a document is an entry      held out: 1 entry in 24
    pydocs       python3.11-doc     PSF             a document is a page        held out: whole pages
    docstrings   libpython3.11-stdlib  PSF          a document is a module      held out: the modules of those pages, and more
    sqlite       sqlite3-doc        public domain   a document is a page        held out: whole pages
    devil        dict-devil         public domain   a document is an entry      held out: everything

Splitting by whole documents and not by lines matters: a held-out line between two training lines is easy to guess.
Documents of the same domain still share sentences, so any training line of 40 characters or more that also stands in
a held-out text is taken out of the training text, and the overlap that is left is measured (`overlap`).
"""

import ast
import gzip
import hashlib
import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.tiny_llama.pages import page_text

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

KJV_BOOKS = ("Ruth", "Jonah", "Malachi", "Philippians", "James")
PYTHON_MODULES = re.compile(
    "bisect|calendar|cmd|colorsys|fractions|getpass|graphlib|heapq|linecache|quopri|sched|shelve|textwrap|timeit|"
    "webbrowser|zipapp|queue|reprlib|mailcap"
)
MORE_MODULES = re.compile("cgitb|csv|dis|imaplib|pprint|statistics|tabnanny|trace")  # docstrings only
SQLITE_PAGES = re.compile("autoinc|isolation|lang_upsert|nulls|partialindex|quickstart|rowvalue|whentouse")

PYTHON_SKIP = re.compile(
    r"(?:^|/)(?:genindex|contents|search|py-modindex|copyright|license|about|download|bugs|index|changelog|"
    r"audit_events|asyncio-api-index|asyncio-llapi-index)[^/]*$|^distutils/"
)
SQLITE_SKIP = re.compile(
    r"^(?:requirements|capi3ref|keyword_index|syntaxdiagrams|fileformat|sitemap|doclist|toc|index|search|docs|"
    r"consortium.*|copyright-release|prosupport|doc_.*_crossref|cves|chronology|mingw|download|oldnews|hp1)$"
)


@dataclass(frozen=True)
class Document:
    """A piece of text that is wholly in the training text or wholly held out."""

    domain: str
    name: str
    text: str
    held_out: bool


def fetch(folder: Path, debs: Path | None = None) -> dict[str, dict[str, str]]:
    """Download the packages (or take them from `debs`) and unpack each into `folder`/NAME.

    Returns:
        for each package, its file name (which holds the version) and its sha256.

    Raises:
        RuntimeError: apt-get or dpkg-deb failed, or a package is not in `debs`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in PACKAGES:
        source = debs or folder
        if debs is None and not any(folder.glob(f"{package}_*.deb")):
            run(["apt-get", "download", package], cwd=folder)
        files = sorted(source.glob(f"{package}_*.deb"))
        if not files:
            raise RuntimeError(
                f"{source} has no {package}_*.deb; download it there with: apt-get download {package}"
            )
        run(["dpkg-deb", "-x", str(files[-1].resolve()), package], cwd=folder)
        found[package] = {
            "file": files[-1].name,
            "sha256": hashlib.sha256(files[-1].read_bytes()).hexdigest(),
        }
    return found


def run(command: list[str], cwd: Path) -> str:
    """Run a program and return what it prints; say what to do when it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise RuntimeError(
            f"{command[0]} is not here: this step needs Debian 12 on x86-64. Elsewhere, fetch and unpack the packages "
            "there and pass the folder of .deb files with --debs"
        ) from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def kjv(folder: Path) -> list[Document]:
    """The King James Version: a heading, then a verse a line, without verse numbers."""
    program = (folder / "bible-kjv/usr/bin/bible").resolve()
    data = (folder / "bible-kjv-text/usr/lib").resolve()
    text = run([str(program), "-p", str(data), "-l10000", "gen1:1-rev22:21"], cwd=folder)
    documents = []
    for chapter in re.split(r"\n(?=\S[^\n]* \d+\n\n)", "\n" + text.lstrip()):
        heading, _, verses = chapter.strip().partition("\n")
        lines = [re.sub(r"^\s*\d+ ", "", line).strip() for line in verses.splitlines()]
        body = "\n".join(line for line in lines if line)
        book = heading.rsplit(" ", 1)[0]
        documents.append(Document("kjv", heading, f"{heading}\n\n{body}\n", book in KJV_BOOKS))
    return documents


def entries(text: str, start: str) -> list[tuple[str, str]]:
    """Dictionary text as (head word, entry), cut where `start` matches; hard-wrapped paragraphs made one line."""
    found = []
    for entry in re.split(rf"\n(?={start})", text):
        paragraphs = re.split(r"\n\s*\n", entry.strip("\n"))
        body = "\n\n".join(reflow(paragraph) for paragraph in paragraphs if paragraph.strip())
        found.append((re.split(r"[,:.(]", body.lstrip(":"))[0].strip(), body + "\n"))
    return found


def reflow(paragraph: str) -> str:
    """Join the lines of a paragraph, unless it is indented more than its entry (verse, tables): then keep them."""
    lines = paragraph.splitlines()
    indents = {len(line) - len(line.lstrip()) for line in lines}
    if len(indents) > 1 or max(indents) > 3:
        return "\n".join(line.rstrip() for line in lines)
    return " ".join(line.strip() for line in lines)


def jargon(folder: Path) -> list[Document]:
    """The entries of the Jargon File 4.4.7."""
    text = gzip.decompress(
        (folder / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()
    ).decode()
    first, last = text.index("\n   :(TM):"), text.index("\n   :zorkmid:")
    end = text.index("\n\n\n", last) if "\n\n\n" in text[last:] else last + 2000
    return [
        Document("jargon", head, body, every(24, head))
        for head, body in entries(text[first + 1 : end], r"   :[^:\n]+:")
    ]


def devil(folder: Path) -> list[Document]:
    """The Devil's Dictionary: the new domain, all of it held out."""
    text = gzip.decompress((folder / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()).decode()
    return [
        Document("devil", head, body, True)
        for head, body in entries(text, r"[A-Z][A-Z' -]+(?:,|\.)")
        if re.match(r"[A-Z][A-Z' -]+(?:,|\.)", body)
    ]


def every(n: int, name: str) -> bool:
    """True for one name in n, always the same ones."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % n == 0


def pydocs(folder: Path) -> list[Document]:
    """The pages of Python 3.11's documentation, without indexes and the change log."""
    root = folder / "python3.11-doc/usr/share/doc/python3.11/html"
    documents = []
    for path in sorted(root.glob("*/*.html")) + sorted(root.glob("glossary.html")):
        name = str(path.relative_to(root).with_suffix(""))
        if name.startswith("_") or PYTHON_SKIP.search(name):
            continue
        html = path.read_text(encoding="utf-8")
        body = html[
            html.index('role="main">') + len('role="main">') : html.rindex('class="sphinxsidebar"') - 5
        ]
        held_out = bool(PYTHON_MODULES.fullmatch(name.removeprefix("library/")))
        documents.append(Document("pydocs", name, page_text(body), held_out))
    return documents


def docstrings(folder: Path) -> list[Document]:
    """Signatures and docstrings of the standard library, a module a document; read with `ast`, nothing is imported."""
    root = folder / "libpython3.11-stdlib/usr/lib/python3.11"
    documents = []
    for path in sorted(p for p in root.rglob("*.py") if p.is_file()):  # one link dangles
        name = str(path.relative_to(root).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        if re.match(r"pydoc_data|encodings|lib2to3|idlelib|test|unittest\.test|.*\.tests?\b", name):
            continue  # pydoc_data repeats the reference manual
        lines = list(described(ast.parse(path.read_text(encoding="utf-8")), ""))
        text = f"# module {name}\n\n" + "\n".join(lines) + "\n"
        held_out = bool(PYTHON_MODULES.fullmatch(name) or MORE_MODULES.fullmatch(name))
        if len(text) > 400:
            documents.append(Document("docstrings", name, text, held_out))
    return documents


def described(node: ast.AST, indent: str):
    """The lines of every definition with a docstring under `node`, in source order."""
    inner = indent
    if not isinstance(node, ast.Module):
        inner = indent + "    "
    doc = ast.get_docstring(node, clean=True) if hasattr(node, "body") else None
    if doc:
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield f"{indent}class {node.name}({bases}):" if bases else f"{indent}class {node.name}:"
        elif not isinstance(node, ast.Module):
            yield f"{indent}def {node.name}({ast.unparse(node.args)}):"
        yield "\n".join((inner + line).rstrip() for line in f'"""{doc}"""'.splitlines()) + "\n"
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from described(child, inner)


def sqlite(folder: Path) -> list[Document]:
    """The pages of SQLite's documentation, without indexes and copies of other pages."""
    root = folder / "sqlite3-doc/usr/share/doc/sqlite3"
    documents = []
    for path in sorted([*root.glob("*.html"), *root.glob("c3ref/*.html"), *root.glob("session/*.html")]):
        name = str(path.relative_to(root).with_suffix(""))
        if SQLITE_SKIP.match(name) or name in (
            "c3ref/intro",
            "c3ref/objlist",
            "c3ref/constlist",
            "c3ref/funclist",
        ):
            continue
        text = page_text(path.read_text(encoding="utf-8", errors="replace"))
        text = re.sub(r"\n(?:[a-z-]+:\n+)+", "\n", text)  # names of syntax diagrams, which are images
        if len(text) > 300:
            documents.append(Document("sqlite", name, text, bool(SQLITE_PAGES.fullmatch(name))))
    return documents


def normal(line: str) -> str:
    return re.sub(r"\W+", " ", line).strip().lower()


def collect(folder: Path) -> list[Document]:
    """All documents: held-out text cut to its budget at whole documents, training text cleaned of what it repeats."""
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


def grams(text: str, n: int):
    words = normal(text).split()
    return zip(*(words[i:] for i in range(n)), strict=False)


def make(work: Path, debs: Path | None = None) -> list[Document]:
    """The documents, from `work`/corpus.jsonl if they were made before; else fetched, made and written there."""
    path = work / "corpus.jsonl"
    if not path.exists():
        packages = fetch(work / "packages", debs)
        documents = collect(work / "packages")
        (work / "packages.json").write_text(json.dumps(packages, indent=1))
        scratch = path.with_suffix(".part")
        scratch.write_text("".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in documents))
        os.replace(scratch, path)
    return [Document(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
