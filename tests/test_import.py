"""`import labkit`: what it offers, what it does not load, and how an old import fails."""

import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import labkit

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Another Python, started in the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_every_public_name_is_there_and_the_list_is_sorted():
    assert list(labkit.__all__) == sorted(labkit.__all__)
    assert [name for name in labkit.__all__ if not hasattr(labkit, name)] == []
    assert labkit.__version__ == importlib.metadata.version("labkit")


def test_import_labkit_is_light_and_its_folders_come_when_they_are_asked_for():
    code = """
import sys, labkit
slow = ("transformers", "pandas", "matplotlib", "ipywidgets", "peft", "scipy", "numba")
print([name for name in sys.modules if name in slow or name.startswith("labkit.lab")])
print(callable(labkit.models.load), callable(labkit.memory.plan), callable(labkit.sweeps.run_experiment))
print(all(getattr(labkit, name).__name__ == f"labkit.{name}" for name in labkit.FOLDERS))
print([name for name in sys.modules if name in slow[2:5] or name.startswith("labkit.lab")])
"""
    done = python("-c", code)
    assert done.stdout.splitlines() == ["[]", "True True True", "True", "[]"], done.stderr


def test_the_folders_are_those_on_disk():
    folders = {path.parent.name for path in (ROOT / "labkit").glob("*/__init__.py")}
    assert set(labkit.FOLDERS) == folders - {"lab"}
    assert len([p for p in (ROOT / "labkit").iterdir() if p.name != "__pycache__"]) <= 23


@pytest.mark.parametrize(
    "old",
    ["quant_linear", "train", "datasets", "variants", "beyond_lora", "results", "kernels", "model_shapes", "anatomy"],
)  # fmt: skip
def test_an_old_module_fails_with_pythons_own_error(old):
    with pytest.raises(ModuleNotFoundError, match=f"^No module named 'labkit.{old}'"):
        importlib.import_module(f"labkit.{old}")


def test_a_name_that_is_not_there_fails_with_pythons_own_error():
    with pytest.raises(AttributeError, match="module 'labkit' has no attribute 'quant_linear'"):
        labkit.quant_linear  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Results' from 'labkit.sweep'"):
        from labkit.sweep import Results  # noqa: F401


def test_a_fetched_model_is_a_command(smollm2):
    done = python("-m", "labkit.models", "fetch", "smollm2-135m")
    assert done.returncode == 0 and done.stdout.startswith("smollm2-135m is in "), done.stderr
    wrong = python("-m", "labkit.models", "fetch", "smollm")
    assert wrong.returncode == 1
    assert wrong.stderr == "usage: python -m labkit.models fetch NAME, with NAME one of: smollm2-135m\n"


def test_an_experiment_is_a_command():
    done = python("-m", "labkit.sweep", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m labkit.sweep"), done.stderr
    wrong = python("-m", "labkit.sweep", "experiments/nothing.toml")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: "), wrong.stderr


def test_every_module_is_imported_without_running_anything():
    """As the generator of the API pages imports them."""
    names = [m.name for m in pkgutil.walk_packages(labkit.__path__, "labkit.")]
    assert "labkit.models.__main__" in names and len(names) > 150
    for name in names:
        if not name.startswith("labkit.quant.kernels.triton"):  # needs Triton
            importlib.import_module(name)
