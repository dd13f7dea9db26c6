"""What may be missing, is: packages, a network, an installed labkit, folders that can be written. In other processes."""

import importlib.metadata
import json
import os
import shutil
import sys

import pytest

from tests.gpu import hiding, work

OPTIONAL = (
    "bitsandbytes",
    "gguf",
    "ipykernel",
    "matplotlib",
    "numba",
    "pandas",
    "peft",
    "platformdirs",
    "scipy",
)
WITH_THEM = ("IPython", "accelerate", "ipywidgets", "llvmlite", "psutil", "triton")
ALL = OPTIONAL + WITH_THEM
MARK = "mark" + ".gpu"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What comes out with all packages."""
    return json.loads(json.dumps(work.work(str(tmp_path_factory.mktemp("all")))))


def out_of(arguments, folder, packages=(), **options) -> str:
    """What the process prints, if all goes well and nothing asked for a network."""
    done = hiding.run(arguments, folder, packages, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "attempts").exists(), (folder / "attempts").read_text()
    return done.stdout


def check_same(made: dict, expected: dict) -> None:
    """The same bits of quantizing, the same answers; losses to within the order of their sums."""
    assert (made["bits"], made["answers"]) == (expected["bits"], expected["answers"])
    assert made["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert made["peaks"][0] == expected["peaks"][0], "the plan"


def test_what_is_hidden_is_found_by_nothing(tmp_path):
    code = """
import importlib.metadata, importlib.util, socket
print(importlib.util.find_spec("numba"), importlib.util.find_spec("numpy") is not None)
for attempt in (lambda: __import__("numba"), lambda: importlib.metadata.version("numba"),
                lambda: importlib.metadata.version("labkit"), lambda: socket.create_connection(("127.0.0.1", 9))):
    try:
        print(attempt())
    except (ImportError, OSError) as error:
        print(type(error).__name__)
"""
    done = hiding.run(["-c", code], tmp_path, ["numba"])
    expected = [
        "None True",
        "ModuleNotFoundError",
        "PackageNotFoundError",
        "PackageNotFoundError",
        "gaierror",
    ]
    assert done.stdout.splitlines() == expected, done.stderr
    assert (tmp_path / "attempts").read_text() == "127.0.0.1\n"


def test_without_any_of_them_everything_needed_works_with_the_same_bits(tmp_path, expected):
    check_same(json.loads(out_of(["tests/gpu/work.py", str(tmp_path)], tmp_path, ALL)), expected)
    recorded = json.loads((tmp_path / "adapter" / "labkit.json").read_text())
    assert recorded["versions"]["labkit"] == "unknown", "a checkout that nobody installed"


@pytest.fixture(scope="module")
def without_each(tmp_path_factory):
    """(folder, stderr) of a process and of its forks, each without one package from when it is asked for."""
    folder = tmp_path_factory.mktemp("each")
    done = hiding.run(["tests/gpu/without_each.py", str(folder)], folder, FORKS_WITHOUT=" ".join(OPTIONAL))
    assert not (folder / "attempts").exists(), (folder / "attempts").read_text()
    return folder, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", OPTIONAL)
def test_without_one_of_them_everything_needed_works_with_the_same_bits(without_each, expected, package):
    folder, stderr = without_each
    never_asked_for = not (folder / package).exists()  # then it is all the same whether it is there
    made = folder / ("." if never_asked_for else package) / "made.json"
    assert made.exists(), stderr[-3000:]
    check_same(json.loads(made.read_text()), expected)


@pytest.mark.slow
def test_what_is_needed_asks_for_some_of_them(without_each):
    """Otherwise the forks would show nothing."""
    folder, _ = without_each
    assert {"numba", "platformdirs", "scipy"} <= {path.name for path in folder.iterdir()}


def test_what_needs_one_says_so_when_it_is_called(tmp_path):
    code = """
from pathlib import Path
import labkit
from pathlib import Path
from labkit import sweeps
from labkit.memory import crossover, plan
from labkit.models.gguf import read_gguf
from labkit.models.loading import load
for call in (
    lambda: labkit.History().to_frame(), lambda: plan("tiny-llama").to_frame(), lambda: crossover("tiny-llama", {}, {}),
    lambda: plan("tiny-llama").compare(plan("tiny-llama")), lambda: sweeps.mean_interval([1.0, 2.0]),
    lambda: sweeps.Results().to_frame(), lambda: read_gguf(Path("a.gguf")), lambda: load("smollm2-135m"),
):
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
    told = out_of(["-c", code], tmp_path, ALL, LABKIT_CACHE=str(tmp_path / "cache")).splitlines()
    needs = (
        ("pandas", "History.to_frame"),
        ("pandas", "Ledger.to_frame"),
        ("pandas", "crossover"),
        ("pandas", "Ledger.compare"),
        ("scipy", "mean_interval"),
        ("pandas", "Results.to_frame"),
        ("gguf", "reading a GGUF file"),
    )
    expected = [
        f"ModuleNotFoundError: {p} is not installed, and {what} needs it; pip install {p}"
        for p, what in needs
    ]
    assert told[:-1] == expected
    assert told[-1] == (
        "ModelUnavailable: gguf is not installed, and making smollm2-135m from its file needs it; pip install gguf"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere platformdirs knows another place")
def test_without_platformdirs_the_cache_is_where_it_is_with_it(tmp_path):
    """A model that was fetched with platformdirs is found without it."""
    code = """
import os, sys
from labkit.paths import cache_folder
for folder in ("", sys.argv[1]):
    os.environ["XDG_CACHE_HOME"] = folder
    print(cache_folder())
"""
    run = ["-c", code, str(tmp_path / "xdg")]
    found = [
        out_of(run, tmp_path, absent, HOME=str(tmp_path), LABKIT_CACHE="")
        for absent in ((), ["platformdirs"])
    ]
    assert found[0] == found[1]
    assert found[1].splitlines() == [f"{tmp_path}/.cache/labkit", f"{tmp_path}/xdg/labkit"]


@pytest.mark.slow
def test_a_day_goes_through_without_any_of_them_and_without_a_network(tmp_path):
    day = [
        "scripts/gpu_day.py",
        "--cpu",
        "--only",
        "steps",
        "finetune",
        "--results",
        str(tmp_path / "results"),
    ]
    printed = out_of(day, tmp_path, ALL, LABKIT_CACHE=str(tmp_path / "cache"))
    for package in ("bitsandbytes", "gguf", "numba", "peft", "platformdirs", "triton"):
        assert f"without {package}: " in printed
    assert "smollm2-135m is not in labkit's cache" in printed
    for name in ("steps", "finetune"):
        (record,) = (tmp_path / "results").glob(f"*/{name}.json")
        record = json.loads(record.read_text())
        assert {row["outcome"] for row in record["rows"]} <= {"measured", "skipped"}
        assert {"numba", "gguf"} <= record["left_out"].keys()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are Unix's")
def test_in_a_checkout_that_is_read_only_and_without_a_home_everything_needed_works(tmp_path, expected):
    """As of another user: neither the checkout nor a cache can be written."""
    checkout, mine = tmp_path / "checkout", tmp_path / "mine"
    mine.mkdir()
    for name in ("labkit", "data", "tests", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.ipynb")
        shutil.copytree(hiding.ROOT / name, checkout / name, ignore=ignored)
    for path in (checkout, *checkout.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    # root writes everywhere, unless it gives up that right
    unprivileged = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if unprivileged and not shutil.which("setpriv"):
        pytest.skip("root cannot give up its rights without setpriv")
    surroundings = dict(
        root=checkout, before=unprivileged, HOME="/nonexistent", TMPDIR=str(mine), LABKIT_CACHE=""
    )
    try:
        tries = "import pathlib; pathlib.Path('labkit', 'x').write_text('')"
        assert "PermissionError" in hiding.run(["-c", tries], mine, **surroundings).stderr
        done = hiding.run(["tests/gpu/work.py", str(mine)], mine, **surroundings)
        assert done.returncode == 0, done.stderr[-3000:]
        check_same(json.loads(done.stdout), expected)
        done = hiding.run(["scripts/gpu_day.py", "--cpu", "--only", "finetune"], mine, **surroundings)
        assert done.returncode == 2 and "--results FOLDER writes elsewhere" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    finally:
        for path in (checkout, *checkout.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


def test_the_tests_for_a_gpu_can_be_read_with_nothing_but_pytest_beside_what_is_needed(tmp_path):
    """One file that cannot be imported would be a failure on a machine that has no more."""
    files = [
        str(path) for path in sorted((hiding.ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()
    ]
    options = [
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--collect-only",
    ]
    absent = (*ALL, "hypothesis", "nbclient", "nbval", "playwright", "xdist")
    found = out_of([*options, *files], tmp_path, absent)
    for folder in ("lora", "optim", "training"):
        assert f"tests/{folder}/test_on_gpu.py::" in found


def test_the_hidden_packages_are_real_ones():
    """A misspelled name would hide nothing."""
    installed = {
        name.lower() for names in importlib.metadata.packages_distributions().values() for name in names
    }
    installed |= {name.lower() for name in importlib.metadata.packages_distributions()}
    unknown = {name for name in OPTIONAL if name.lower() not in installed}
    assert not unknown & {"numba", "gguf", "platformdirs", "pandas", "scipy"}
