"""The datasheets: what they name is there, and their code runs up to what needs a model."""

import pkgutil
import re

import pytest

from labkit.paths import data_folder

SHEETS = sorted(data_folder().glob("*/README.md"))


def is_there(name: str) -> bool:
    """Is it a module, or a name in one?"""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.parent.name)
def test_modules_names_and_files_of_a_datasheet_exist(sheet):
    text = sheet.read_text(encoding="utf-8")
    names = re.findall(r"\b(?:labkit|recipes)(?:\.[a-z_]+)+\b", text)
    assert [name for name in names if not is_there(name)] == []
    files = re.findall(r"`((?:recipes|tests|data)/[\w./-]+\.\w+)`", text)
    assert [file for file in files if not (data_folder().parent / file).exists()] == []


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.parent.name)
def test_code_of_a_datasheet_imports_what_it_uses(sheet):
    for block in re.findall(r"```python\n(.*?)```", sheet.read_text(encoding="utf-8"), re.S):
        compile(block, str(sheet), "exec")
        for line in re.findall(r"^(?:from|import) .*$", block, re.M):
            exec(line, {})
