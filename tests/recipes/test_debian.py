"""Packages: unpacked from a folder or fetched, and never installed; what is missing is said."""

import hashlib
import shutil
import subprocess

import pytest

from recipes import debian

CONTROL = "Package: poems\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: poems\n"


@pytest.fixture
def package(tmp_path):
    """A small package `poems` in a folder of packages."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    (tmp_path / "tree" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(CONTROL)
    (tmp_path / "tree" / "poem.txt").write_text("so much depends\n")
    debs = tmp_path / "debs"
    debs.mkdir()
    target = debs / "poems_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", target], check=True, capture_output=True)
    return target


def test_a_package_is_unpacked_with_its_version_and_checksum(package, tmp_path):
    (tmp_path / "work").mkdir()
    folder, source = debian.unpack("poems", tmp_path / "work", package.parent)
    assert folder == tmp_path / "work" / "poems" and (folder / "poem.txt").read_text() == "so much depends\n"
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    assert source == {"file": "poems_1.0_all.deb", "sha256": digest}


def test_a_package_is_fetched_once(package, tmp_path, monkeypatch):
    work, calls, run = tmp_path / "work", [], debian.run
    work.mkdir()

    def fetch(command, cwd):
        calls.append(command[0])
        return shutil.copy(package, cwd) if command[0] == "apt-get" else run(command, cwd)

    monkeypatch.setattr(debian, "run", fetch)
    for _ in range(2):
        assert (debian.unpack("poems", work)[0] / "poem.txt").is_file()
    assert calls == ["apt-get", "dpkg-deb", "dpkg-deb"]


def test_what_is_missing_is_said_with_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match=r"has no poems_\*.deb; get it with: apt-get download poems"):
        debian.unpack("poems", tmp_path, tmp_path)
    with pytest.raises(RuntimeError, match="no-such-program is missing: .* --debs"):
        debian.run(["no-such-program"], tmp_path)
    with pytest.raises(RuntimeError, match="false failed"):
        debian.run(["false"], tmp_path)
