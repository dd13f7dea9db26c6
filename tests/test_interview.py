"""docs/interview.md: every answer has four sentences, a section that shows it, numbers from there, and the verdicts of the claims."""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from labkit.lab.claims import VERDICTS, ledger

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "interview.md"
QUESTION = re.compile(
    r"^### (?P<title>\d+ · .+?)\n\n<details><summary>Answer</summary>\n\n(?P<answer>.+?)\n\n\*\*Shown in\*\* (?P<shown>.+?)"
    r"\n\n\*\*The usual answer\.\*\* (?P<usual>.+?)\n\n</details>",
    re.MULTILINE | re.DOTALL,
)
SENTENCE_END = re.compile(r"[.?!](?=\s+[A-Z(ρα“]|\s+r |\s+rsLoRA|\s+bf16|$)")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-\d+)?")
LEVELS = ["Entry", "Mid", "Forward-deployed"]


def questions():
    return [found.groupdict() for found in QUESTION.finditer(PAGE.read_text(encoding="utf-8"))]


@cache
def cells(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells


def places(shown):
    """The lessons and the headings that an answer names."""
    for name, headings in re.findall(
        r"\[`(\w+)`\]\(\.\./notebooks/\1\.ipynb\), ((?:“.+?”(?: and |; |\.$|$))+)", shown
    ):
        yield name, re.findall(r"“((?:[^“”]|“[^”]*”)+)”(?: and |; |\.$|$)", headings)


def headings(name):
    lines = [
        line for cell in cells(name) if cell.cell_type == "markdown" for line in cell.source.splitlines()
    ]
    return {
        re.sub(r" \((core|optional)\)$", "", line.lstrip("#").strip())
        for line in lines
        if line.startswith("##")
    }


@cache
def text_of(name):
    """What a lesson says: its sources, and what its cells have printed and shown."""
    parts = []
    for cell in cells(name):
        parts.append(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts += [
                output.get("text", ""),
                data.get("text/markdown", ""),
                data.get("text/plain", ""),
                data.get("text/html", ""),
            ]
    return "\n".join(parts)


def numbers(text):
    """The numbers of a text but for small whole ones, which are counts of words as much as of anything."""
    plain = text.replace("−", "-").replace("\u202f", "")
    found = [one.lstrip("+-").replace(",", "") for one in NUMBER.findall(plain)]
    return {one for one in found if "." in one or "e-" in one or float(one) > 12}


@pytest.mark.parametrize("asked", questions(), ids=lambda asked: asked["title"])
def test_an_answer_has_four_sentences_from_the_sections_that_it_names(asked):
    assert len(SENTENCE_END.findall(asked["answer"])) == 4
    found = list(places(asked["shown"]))
    assert found and asked["shown"].count("[`") == len(found)
    for name, titles in found:
        assert titles and set(titles) <= headings(name), set(titles) - headings(name)
    there = set().union(*(numbers(text_of(name)) for name, _ in found))
    assert numbers(asked["answer"]) <= there, numbers(asked["answer"]) - there


def test_there_are_thirty_questions_of_three_levels_and_none_is_malformed():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == LEVELS
    titles = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert [asked["title"] for asked in questions()] == titles
    assert [int(title.split(" · ")[0]) for title in titles] == list(range(1, 31))


def test_the_verdicts_are_those_of_the_notebooks():
    settled = {}
    for row in ledger(ROOT / "notebooks"):
        settled.setdefault(row["claim"], set()).add(row["verdict"])
    quoted = re.findall(rf"\((C\d+), ({'|'.join(VERDICTS)})", PAGE.read_text(encoding="utf-8"))
    assert len(quoted) > 30
    assert [(claim, said) for claim, said in quoted if said not in settled.get(claim, ())] == []


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
