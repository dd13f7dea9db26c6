"""Compiled kernels are kept by all that they were made from, believed only if whole, and never a must."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest

import labkit
from labkit.quant.kernels import kept, tasks
from tests.campaign.harness import small_disk


def compile_task(name: str = "task"):
    """A small task that writes 7; compiled, or loaded."""

    def task(arguments):
        numba.carray(arguments, 1)[0] = 7

    task.__name__ = name
    return kept.compiled(tasks.TASK)(task)


def result(kernel) -> int:
    memory = np.zeros(1, np.int64)
    kernel.ctypes(memory.ctypes.data_as(kernel.ctypes.argtypes[0]))
    return int(memory[0])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Sources, a folder for what is kept of them, and another for what the user keeps."""
    (tmp_path / "kernels").mkdir()
    for name in ("tasks.py", "lookups.py"):
        (tmp_path / "kernels" / name).write_text(f"# {name}\n")
    monkeypatch.setattr(kept, "SOURCES", tmp_path / "kernels")
    monkeypatch.setattr(kept, "user_cache_dir", lambda name: str(tmp_path / "home" / name))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for cached in (kept.hash_sources, kept.warn_once):
        cached.cache_clear()
        monkeypatch.setattr(kept, cached.__name__, cached)
    yield tmp_path / "kernels" / "__pycache__"
    kept.hash_sources.cache_clear()
    kept.warn_once.cache_clear()


def kept_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kernel"))


@pytest.fixture
def fails_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_second_process_loads_what_the_first_compiled(place, fails_to_warn):
    first, second = compile_task(), compile_task()
    assert (first.cache_hits, second.cache_hits) == (0, 1) and result(first) == result(second) == 7
    assert len(kept_in(place)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place.parent / "lookups.py").write_text("# changed\n"),
        lambda place: (place.parent / "another.py").write_text(""),
        lambda place: (place.parent / "lookups.py").unlink(),
        lambda place: (place.parent / "lookups.py").rename(place.parent / "renamed.py"),
    ],
    ids=["another text", "another file", "a file less", "another name"],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_of_any_source_compiles_anew_and_takes_the_old_away(
    place, change, elsewhere, monkeypatch, tmp_path
):
    if elsewhere:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "elsewhere"))
    compile_task(), compile_task("other")
    stamps = {path: path.stat().st_mtime for path in place.parent.glob("*.py")}
    change(place)
    for path, stamp in stamps.items():  # not by the time of a file, which an unpacked archive sets back
        if path.exists():
            os.utime(path, (stamp, stamp))
    kept.hash_sources.cache_clear()
    assert compile_task().cache_hits == 0 and compile_task().cache_hits == 1
    (folder,) = {path.parent for path in tmp_path.rglob("*.kernel")}
    assert len(kept_in(folder)) == 2 and (folder == place) != elsewhere


def test_another_machine_and_other_variables_of_numba_have_their_own(place, monkeypatch):
    compile_task()
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert compile_task().cache_hits == 0
    monkeypatch.delenv("NUMBA_OPT")
    assert compile_task().cache_hits == 1 and len(kept_in(place)) == 2
    here = Path(__file__)
    assert kept.file_name("task", ("x86", "a"), here) != kept.file_name("task", ("x86", "b"), here)


def test_a_task_that_stands_elsewhere_is_kept_by_its_own_file_too(place, tmp_path):
    """As that of `labkit.serving.few_rows`."""
    elsewhere = tmp_path / "elsewhere.py"

    def compile_there(number):
        elsewhere.write_text(
            f"import numba\n\n\ndef task(arguments):\n    numba.carray(arguments, 1)[0] = {number}\n"
        )
        kept.hash_sources.cache_clear()
        namespace: dict = {}
        exec(compile(elsewhere.read_text(), str(elsewhere), "exec"), namespace)
        return kept.compiled(tasks.TASK)(namespace["task"])

    kernels = [compile_there(number) for number in (7, 7, 8)]
    assert [kernel.cache_hits for kernel in kernels] == [0, 1, 0]
    assert [result(kernel) for kernel in kernels] == [7, 7, 8] and len(kept_in(place)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:20],
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: bytes(len(raw)),
        lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
        lambda raw: b"\x80\x04." + raw,
    ],
)
def test_what_is_damaged_counts_as_missing_and_is_replaced(place, damage, fails_to_warn):
    compile_task()
    (path,) = kept_in(place)
    path.write_bytes(damage(path.read_bytes()))
    again = compile_task()
    assert (again.cache_hits, result(again)) == (0, 7)
    assert compile_task().cache_hits == 1


def test_a_folder_in_place_of_the_file_does_not_stop_it(place):
    compile_task()
    (path,) = kept_in(place)
    path.unlink()
    path.mkdir()
    assert result(compile_task()) == 7


def unwritable(folder: Path) -> None:
    """Make `folder` a file: not even root can write into it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()


def test_beside_unwritable_sources_the_users_folder_is_taken(place, tmp_path, fails_to_warn):
    unwritable(place)
    assert compile_task().cache_hits == 0 and compile_task().cache_hits == 1
    assert len(list((tmp_path / "home").rglob("*.kernel"))) == 1


def test_with_no_place_to_write_it_compiles_with_one_warning(place, tmp_path):
    unwritable(place)
    unwritable(tmp_path / "home")
    with pytest.warns(RuntimeWarning, match="cannot be kept, .* set NUMBA_CACHE_DIR to a folder") as seen:
        kernels = [compile_task(), compile_task("other"), compile_task()]
    assert [result(kernel) for kernel in kernels] == [7, 7, 7] and len(seen) == 1


def test_a_user_without_a_home_gets_no_folder_called_tilde(place, tmp_path, monkeypatch):
    unwritable(place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept, "user_cache_dir", lambda name: "~/.cache/" + name)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        compile_task()
    assert not (tmp_path / "~").exists()


def test_a_full_disk_is_a_warning_and_leaves_nothing_behind(place, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", kilobytes=4) as disk:
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(disk))
        with pytest.warns(RuntimeWarning, match="the disk is full"):
            assert result(compile_task()) == 7
        assert not [path for path in disk.rglob("*") if path.is_file()]


COMPILE = "from labkit.quant.tensor import quantize; import torch; print(quantize(torch.ones(64, 64)).dequantize().sum())"


def run(tree: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=tree
    )


@pytest.mark.slow
def test_kernels_kept_elsewhere_follow_a_change_of_a_source_that_holds_none(tmp_path, monkeypatch):
    shutil.copytree(
        Path(labkit.__file__).parent,
        tmp_path / "tree" / "labkit",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    with monkeypatch.context() as patch:  # what is compiled here already need not be compiled twice
        patch.setattr(kept, "SOURCES", tree / "labkit" / "quant" / "kernels")
        patch.setattr(numba.config, "CACHE_DIR", str(cache))
        (folder,) = kept.folders()
    folder.mkdir(parents=True)
    for kernel in kept.SOURCES.glob("__pycache__/*.kernel"):
        shutil.copy(kernel, folder)
    first = run(tree, NUMBA_CACHE_DIR=str(cache))
    assert "tensor(4096.)" in first.stdout and "kept" not in first.stderr, first.stderr
    stores = tree / "labkit" / "quant" / "kernels" / "stores.py"
    text = stores.read_text()
    twice = text.replace(
        "products = scaled(builder, levels, scale)",
        "scale = builder.fadd(scale, scale)\n    products = scaled(builder, levels, scale)",
    )
    assert twice != text
    stores.write_text(twice)
    assert "tensor(8192.)" in run(tree, NUMBA_CACHE_DIR=str(cache)).stdout
