"""The course where it is opened: JupyterLab's settings, one JupyterHub for a room, containers."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
OURS = json.loads((ROOT / "scripts" / "jupyter" / "overrides.json").read_text())
SCHEMAS = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"


@pytest.fixture
def open_lab():
    return runpy.run_path(str(ROOT / "scripts" / "open_lab.py"))


def placed(environment):
    return json.loads((environment / "share/jupyter/lab/settings/overrides.json").read_text())


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="JupyterLab is not installed in this environment")
def test_every_setting_is_one_that_jupyterlab_has_with_a_value_that_it_allows():
    for plugin, values in OURS.items():
        package, name = plugin.split(":")
        schema = json.loads((SCHEMAS / package / f"{name}.json").read_text())
        assert set(values) <= set(schema["properties"]), plugin
        for key, value in values.items():
            jsonschema.validate(value, {k: v for k, v in schema["properties"][key].items() if k != "$ref"})


def test_settings_are_placed_once_and_those_that_stand_there_stay(open_lab, tmp_path):
    open_lab["place_settings"](tmp_path)
    assert placed(tmp_path) == OURS
    path = tmp_path / "share/jupyter/lab/settings/overrides.json"
    theirs = {
        "@jupyterlab/apputils-extension:themes": {"adaptive-theme": False},
        "@other:plugin": {"on": True},
    }
    path.write_text(json.dumps(theirs))
    open_lab["place_settings"](tmp_path)
    assert placed(tmp_path) == OURS | theirs
    before = path.stat().st_mtime_ns
    open_lab["place_settings"](tmp_path)
    assert path.stat().st_mtime_ns == before and [p.name for p in path.parent.iterdir()] == ["overrides.json"]


def test_settings_that_are_broken_or_cannot_be_written_do_not_keep_the_lab_shut(open_lab, tmp_path, capsys):
    path = tmp_path / "share/jupyter/lab/settings/overrides.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    open_lab["place_settings"](tmp_path)
    assert path.read_text() == "{" and "opens with its own settings" in capsys.readouterr().out
    (tmp_path / "file").touch()
    open_lab["place_settings"](tmp_path / "file")
    assert "opens with its own settings" in capsys.readouterr().out


def test_a_container_may_listen_to_its_outside_and_nothing_else_does(open_lab, monkeypatch):
    monkeypatch.delenv("LAB_ADDRESS", raising=False)
    assert "--ServerApp.ip=127.0.0.1" in open_lab["command"]("x.ipynb")
    monkeypatch.setenv("LAB_ADDRESS", "0.0.0.0")
    line = open_lab["command"]("x.ipynb")
    assert "--ServerApp.ip=0.0.0.0" in line and not any("token" in option for option in line)


def hub(folder, monkeypatch):
    """The hub's configuration, loaded as JupyterHub loads it."""
    monkeypatch.setenv("LORA_HUB", str(folder))
    config = Config()
    path = ROOT / "docs" / "teach" / "jupyterhub" / "jupyterhub_config.py"
    runpy.run_path(str(path), init_globals={"get_config": lambda: config})
    return config


def test_the_hubs_configuration_loads_and_nobody_comes_in_unasked(tmp_path, monkeypatch):
    config = hub(tmp_path / "hub", monkeypatch)
    assert (
        config.JupyterHub.authenticator_class == "native" and config.NativeAuthenticator.open_signup is False
    )
    assert config.JupyterHub.hub_bind_url.startswith("http://127.0.0.1:")
    assert config.ConfigurableHTTPProxy.api_url.startswith("http://127.0.0.1:")
    assert (tmp_path / "hub").stat().st_mode & 0o077 == 0, "the database and the secret are in it"
    first = config.Spawner.default_url.removeprefix("/lab/tree/lora-lab/")
    assert (ROOT / first).is_file()


def test_a_students_second_log_in_finds_the_work_of_the_first(tmp_path, monkeypatch):
    give_course = hub(tmp_path / "hub", monkeypatch).Spawner.pre_spawn_hook
    monkeypatch.setitem(give_course.__globals__, "COURSE", tmp_path / "course")
    for name in ("notebooks", "data", "docs"):
        (tmp_path / "course" / name).mkdir(parents=True)
    (tmp_path / "course" / "notebooks" / "00.ipynb").write_text("fresh")
    ada = type("Spawner", (), {"user": type("User", (), {"name": "ada"})})
    give_course(ada)
    mine = tmp_path / "hub" / "home" / "ada" / "lora-lab" / "notebooks" / "00.ipynb"
    assert mine.read_text() == "fresh"
    mine.write_text("my answers")
    give_course(ada)
    assert mine.read_text() == "my answers"


def instructions():
    """(instruction, its words) of the Dockerfile, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split()[1:]) for line in text.splitlines() if line.strip()]


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_the_image_copies_files_that_exist_and_runs_commands_that_exist():
    made = instructions()
    assert made[0][0] == "FROM" and {name for name, _ in made} <= {
        "FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "EXPOSE", "CMD"
    }  # fmt: skip
    for name, words in made:
        if name == "COPY":
            assert all((ROOT / word).exists() for word in words[:-1] if not word.startswith("--")), words
    run = " ".join(" ".join(words) for name, words in made if name == "RUN")
    assert (
        set(re.findall(r"make ((?!git)[a-z-]+)", run.split("useradd")[1])) == {"setup", "model"} <= targets()
    )
    assert json.loads(" ".join(made[-1][1])) == ["make", "lab"]


def test_the_image_runs_as_a_student_and_takes_no_environment_from_outside():
    made = instructions()
    assert [words for name, words in made if name == "USER"] == [["student"]]
    assert [name for name, _ in made].index("USER") < [name for name, _ in made].index("COPY")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "build", ".git"} <= set(ignored)


def test_containers_have_the_python_that_the_locks_have_a_cpu_build_for():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert "3.11" in instructions()[0][1][0] and "3.11" in container["image"]
    assert container["postCreateCommand"].split() == ["make", "model"] and "model" in targets()


@pytest.mark.slow
def test_what_the_image_copies_first_is_enough_to_import_labkit(tmp_path):
    """The layer with the packages is built before the lessons and the data are there."""
    words = [w for name, words in instructions() if name == "COPY" for w in words if not w.startswith("--")]
    for name in words[: words.index(".")]:
        if name != "./" and not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    code = "import labkit.models.fetching, labkit; print(labkit.__file__)"
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
