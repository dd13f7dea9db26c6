"""What the lessons, the guides and the docstrings name is there: every module, every file, every public name."""

import importlib
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = [*GUIDES, *sorted(ROOT.glob("notebooks/*.ipynb")), *sorted(ROOT.glob("labkit/**/*.py"))]


def text_of(page: Path) -> str:
    if page.suffix == ".ipynb":
        return "\n".join(cell.source for cell in nbformat.read(page, as_version=4).cells)
    return page.read_text(encoding="utf-8")


def is_there(name: str) -> bool:
    """Is the dotted `name` a module of labkit, or an attribute of one?"""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[n:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_and_paths_on_a_page_exist(page):
    text = text_of(page)
    paths = set(re.findall(r"(?<![\w/])labkit/[\w/]+(?:\.py|/)", text))
    names = set(re.findall(r"(?<![\w/.:])labkit(?:\.[A-Za-z_]\w*)+", text))
    kernels = "labkit.quant.kernels.triton"  # imports Triton, which is not there without a GPU
    missing = [p for p in paths if not (ROOT / p).exists()]
    missing += [n for n in names if n != "labkit.json" and not n.startswith(kernels) and not is_there(n)]
    assert not missing
