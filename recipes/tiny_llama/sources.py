"""The documents of each domain of tiny-llama's text, read from unpacked Debian packages; see `corpus`.

Each reader returns all documents of its domain and says which are held out: the same ones every time.
"""

import ast
import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.debian import run
from recipes.tiny_llama.pages import page_text

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


Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """A piece of text that is wholly in the training text or wholly held out."""

    domain: str
    name: str
    text: str
    held_out: bool


def kjv(folder: Path) -> list[Document]:
    """The King James Version: a heading, then one verse per line, without verse numbers."""
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
    """Dictionary text as (head word, entry), cut where `start` matches; a paragraph becomes one line."""
    found = []
    for entry in re.split(rf"\n(?={start})", text):
        paragraphs = re.split(r"\n\s*\n", entry.strip("\n"))
        body = "\n\n".join(reflow(paragraph) for paragraph in paragraphs if paragraph.strip())
        found.append((re.split(r"[,:.(]", body.lstrip(":"))[0].strip(), body + "\n"))
    return found


def reflow(paragraph: str) -> str:
    """Join the lines of a paragraph, unless it is indented more than its entry: verse and tables stay."""
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
    """Is this one of the names, one in n, that are always chosen?"""
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
    """Signatures and docstrings of the standard library, by module; read with `ast`, nothing is imported."""
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


def described(node: Described, indent: str) -> Iterator[str]:
    """The lines of every definition with a docstring under `node`, in source order."""
    inner = indent
    if not isinstance(node, ast.Module):
        inner = indent + "    "
    doc = ast.get_docstring(node, clean=True)
    if doc:
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield f"{indent}class {node.name}({bases}):" if bases else f"{indent}class {node.name}:"
        elif not isinstance(node, ast.Module):
            yield f"{indent}def {node.name}({ast.unparse(node.args)}):"
        yield "\n".join((inner + line).rstrip() for line in f'"""{doc}"""'.splitlines()) + "\n"
    for child in node.body:
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
