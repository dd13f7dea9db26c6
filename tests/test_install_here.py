"""scripts/install_here.py: what it installs, what it holds, and one sentence when it cannot; and that lessons point to it."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import types
from pathlib import Path

import nbformat
import pytest

from labkit.models import fetching

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script():
    """scripts/install_here.py as a module."""
    spec = importlib.util.spec_from_file_location("install_here", ROOT / "scripts" / "install_here.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_lesson_says_what_to_run_first_where_its_imports_would_fail(path):
    cells = nbformat.read(path, as_version=4).cells
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    assert re.search(
        r"\n# No labkit here, .* run the cell that README.md gives.\n(import|from) (labkit|bitsandbytes)",
        first,
    )
    earlier = first.split("# No labkit here")[0]
    assert not re.search(r"^(import|from) (labkit|bitsandbytes)", earlier, re.M)


def test_what_is_imported_is_held_and_what_is_missing_is_installed_as_pinned(script, monkeypatch):
    held = script.versions_in_use()
    assert held["pytest"] == pytest.__version__ and held["torch"] == importlib.metadata.version("torch")
    assert "labkit" not in held and script.to_install(script.requirements(), held) == []
    there = script.version_of
    monkeypatch.setattr(script, "version_of", lambda name: None if name == "gguf" else there(name))
    pins = (ROOT / "constraints.txt").read_text()
    (wanted,) = script.to_install(script.requirements(), held)
    assert wanted.startswith("gguf==") and f"\n{wanted}\n" in pins


@pytest.mark.parametrize(
    ("name", "held", "sentence"),
    [
        ("torch", {}, "this runtime has torch 1.0, and the course needs torch>=2.11; choose a newer runtime"),
        (
            "transformers",
            {"transformers": "1.0"},
            "transformers 1.0 is imported already, .* restart the runtime",
        ),
    ],
)
def test_what_is_too_old_and_must_stay_is_named(script, monkeypatch, name, held, sentence):
    there = script.version_of
    monkeypatch.setattr(script, "version_of", lambda one: "1.0" if one == name else there(one))
    with pytest.raises(script.CannotInstall, match=sentence):
        script.to_install(script.requirements(), held)


def test_an_old_python_can_read_the_installer_and_is_told_so(script, monkeypatch):
    ast.parse(Path(script.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(script, "sys", types.SimpleNamespace(version_info=(3, 9, 1)))
    with pytest.raises(script.CannotInstall, match="Python 3.9 is too old; choose a runtime with 3.11"):
        script.main()


def test_what_would_stop_pip_is_said_beforehand(script, monkeypatch, tmp_path):
    script.check_before(["gguf==1.0"])
    with monkeypatch.context() as patch:
        patch.setattr(script.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**8))
        with pytest.raises(script.CannotInstall, match="0.1 GB is free on the disk"):
            script.check_before(["gguf==1.0"])
        script.check_before([])  # labkit alone is a link
    with monkeypatch.context() as patch:
        patch.setattr(script.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(script.CannotInstall, match="has no pip to install with"):
            script.check_before([])
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(
        script.CannotInstall, match="labkit is imported already, from .*; restart the runtime"
    ):
        script.check_before([])


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        (
            "ERROR: Could not find a version (from versions: none)",
            "turn the network on .on Kaggle: Settings, Internet",
        ),
        ("ERROR: [Errno 28] No space left on device", "the disk is full; free some space"),
        ("WARNING: a\nERROR: No room.\nERROR: b", r"pip could not install the packages \(No room.\)"),
        (
            "ERROR: Cannot install a==1.\nERROR: ResolutionImpossible: for help visit",
            r"must stay are in the way \(Cannot install a==1\); restart the runtime",
        ),
        ("", r"pip could not install the packages \(it gave no reason\)"),
    ],
)
def test_a_failure_of_pip_is_one_sentence_without_a_traceback(script, monkeypatch, errors, sentence):
    failed = subprocess.CompletedProcess([], 1, stderr=errors)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(script.CannotInstall, match=sentence) as caught:
        script.install(["gguf==1.0"], {"torch": "2.0"})
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]  # what IPython shows


def test_pip_is_bound_to_what_is_held_and_a_change_of_it_would_be_noticed(script, monkeypatch):
    seen = {}

    def run(command, **_):
        seen["command"] = command
        seen["held"] = Path(command[command.index("--constraint") + 1]).read_text()
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)
    script.install(["gguf==1.0"], {"torch": importlib.metadata.version("torch")})
    assert seen["held"] == f"torch=={importlib.metadata.version('torch')}\n"
    assert (
        seen["command"][-3:] == ["gguf==1.0", "--editable", str(ROOT)] and "--upgrade" not in seen["command"]
    )
    with pytest.raises(script.CannotInstall, match="pip has changed torch"):
        script.install([], {"torch": "2.0"})


def test_a_model_that_cannot_be_fetched_is_one_sentence(script, monkeypatch):
    def unavailable(_):
        raise fetching.ModelUnavailable("could not download it; check the network")

    monkeypatch.setattr(fetching, "fetch", unavailable)
    with pytest.raises(script.CannotInstall, match="^could not download it; check the network$"):
        script.fetch_model()


def test_this_process_sees_the_checkout_and_what_went_to_the_users_own_packages(
    script, monkeypatch, tmp_path
):
    monkeypatch.setattr(script.sys, "path", ["somewhere"])
    monkeypatch.setattr(script.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(script.site, "getusersitepackages", lambda: str(tmp_path))
    for _ in range(2):
        script.make_importable()
    assert script.sys.path == ["somewhere", str(ROOT), str(tmp_path)]
