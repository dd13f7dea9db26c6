"""`python -m labkit.registry`: what its commands print, and with which status they end."""

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import labkit
from labkit.models.loading import load
from labkit.paths import data_folder
from labkit.serving.arguments import make_parser
from labkit.serving.commands import COMMANDS, main
from tests.serving.cases import START, clock_from, write_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(filled, capsys):
    """Run a command on `filled`: (status, what it printed, what it said on stderr)."""

    def command(*arguments, registry=filled.root):
        clock = clock_from(START.replace(hour=14))
        status = main(["--registry", str(registry), *map(str, arguments)], clock)
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def run_json(run):
    """As `run`, of a command that is done: what it printed as JSON."""

    def command(*arguments):
        status, out, err = run("--json", *arguments)
        assert status == 0, err
        return json.loads(out)

    return command


def test_a_version_is_published_with_its_provenance(run, run_json, tmp_path):
    folder = write_adapter(tmp_path / "a", 5)
    (folder / "optimizer.pt").write_text("")
    (tmp_path / "t.jsonl").write_text("{}\n")
    (tmp_path / "c.json").write_text('{"lr": 0.001}')
    status, out, err = run(
        "publish", "support", folder, "--owner", "ann", "--note", "third", "--code", "3f2a91c",
        "--data", tmp_path / "t.jsonl", "--config", tmp_path / "c.json",
        "--result", "tickets.exact_match=0.81", "--result", "tickets.loss=.5", "--alias", "staging",
    )  # fmt: skip
    assert status == 0 and err == "warning: left out, as no part of an adapter: optimizer.pt\n"
    assert re.match(
        r"support@v3 is in .*/adapters/support/v3\nsupport@staging points to v3 since 2026-11-01T14", out
    )
    made = run_json("show", "support@staging")
    assert made["results"] == {"tickets": {"exact_match": 0.81, "loss": 0.5}} and made["config"] == {
        "lr": 0.001
    }
    assert list(made["data"].values()) == ["ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"]
    assert (made["owner"], made["note"], made["code"]) == ("ann", "third", "3f2a91c")


def test_versions_and_aliases_are_listed(run, run_json):
    status, out, _ = run("list")
    assert status == 0 and out.splitlines()[-1] == "support@production → v2"
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["sales@v1", "support@v1", "support@v2"]
    assert "lora r=2  512 bytes  ann  tickets exact_match 0.8  tickets loss 1  the second" in out
    listed = run_json("list", "support")
    assert listed["aliases"] == {"support@production": 2} and len(listed["versions"]) == 2


def test_aliases_are_moved_and_their_history_is_told(run, run_json):
    assert run("rollback", "support@production", "--author", "bob", "--note", "refunds")[1] == (
        "support@production points to v1 since 2026-11-01T14:00:00.000000Z (rollback by bob: refunds)\n"
    )
    assert run("alias", "support@production", "v2", "--expected", "1")[0] == 0
    assert run("alias", "support@production", "--remove")[1].startswith(
        "support@production points to nothing since"
    )
    told = run_json("history", "support@production")
    assert [move["kind"] for move in told] == ["set", "set", "rollback", "set", "remove"]
    assert run("history", "support@production")[1].count("\n") == 5


def test_the_best_version_and_what_served_at_a_time_are_found(run, run_json):
    assert run("best", "exact_match", "--on", "tickets")[1].startswith("support@v2")
    assert run_json("best", "loss", "--on", "tickets", "--lowest")["label"] == "support@v2"
    assert (
        run_json("best", "exact_match", "--on", "tickets", "--since", "2026-11-01T00:02")["label"]
        == "sales@v1"
    )
    assert run("at", "2026-11-01T00:03")[1] == "support@production → v1\n"
    assert run_json("at", "00:04") == {
        "at": "2026-11-01T00:04:00.000000Z",
        "aliases": {"support@production": 2},
    }
    assert run("at", "00:01")[1] == "nothing pointed anywhere then\n"


def test_a_version_is_deleted_and_listed_if_that_is_asked_for(run):
    assert run("delete", "sales@v1")[1] == "sales@v1 is deleted; its record is kept\n"
    assert "sales" not in run("list")[1] and "sales@v1  deleted 2026-11-01T14" in run("list", "--deleted")[1]


def test_a_card_is_printed(run, run_json):
    status, out, _ = run("card", "support")
    assert (
        status == 0
        and out.startswith("---\nbase_model: small\n")
        and "| tickets | exact_match | 0.8 |" in out
    )
    assert run_json("card", "support")["card"] == out


def test_verify_ends_with_the_status_of_what_it_finds(run, run_json, filled):
    assert run("verify")[:2] == (0, "all is well: 3 versions, every file as it was published\n")
    filled.resolve("support").place.unlink()
    status, out, _ = run("verify")
    assert status == 1 and out.startswith("unlinked: support@v2 is not in ")
    assert run_json("verify", "--repair") == {"versions": 3, "problems": []}


def test_the_command_for_vllm_names_what_is_served(run, run_json, filled):
    status, out, err = run("vllm")
    assert status == 0 and err.startswith("warning: support: noted (dtype): weights in float32")
    place = filled.root / "adapters" / "support" / "v2"
    assert shlex.split(out) == [
        "vllm", "serve", "small", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
        "--lora-modules", f"support={place}",
    ]  # fmt: skip
    command = run_json("vllm", "support@v1", "sales@v1", "--base", "/m")["command"]
    assert command[2] == "/m" and command[command.index("--max-loras") + 1] == "3"
    assert [one.partition("=")[0] for one in command[-2:]] == ["support@v1", "sales@v1"]


def test_what_vllm_would_refuse_is_said_and_no_command_is_printed(run, filled, tmp_path):
    assert run("publish", "dora", write_adapter(tmp_path / "a", use_dora=True), "--owner", "ann")[
        2
    ].startswith("warning: it cannot share a base with others in one batch: DoRA")
    status, out, err = run("vllm", "support", "dora@v1")
    assert status == 1 and out == "\n" and "\nwarning: dora@v1: refused (dora): use_dora=true" in err
    filled.remove_alias("support@production")
    assert "nothing to serve: no alias production points anywhere" in run("vllm")[2]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["show", "suport"], 3, "error: there is no adapter 'suport'"),
        (["show", "support@v9"], 3, "error: there is no version v9"),
        (["rollback", "sales@production"], 3, "error: there is no alias sales@production"),
        (["best", "accuracy", "--on", "tickets"], 3, "error: no version has a result 'accuracy'"),
        (["show", "../x"], 1, "error: name='../x' has '.' (FULL STOP)"),
        (["delete", "support@v2"], 1, "error: support@v2 cannot be deleted: support@production points to it"),
        (
            ["alias", "support@production", "1", "--expected", "1"],
            1,
            "error: support@production points to v2, and not",
        ),
        (["alias", "support@production"], 1, "error: give the number of a version, or --remove"),
        (["alias", "support@production", "x"], 1, "error: 'x' is not the number of a version; give 2 or v2"),
        (["at", "noon"], 1, "error: 'noon' is not a time; give 2026-11-29"),
        (["publish", "a", "nowhere", "--owner", "ann"], 1, "error: there is no adapter in nowhere"),
        (
            ["publish", "a", ".", "--owner", "ann", "--result", "em=1"],
            1,
            "error: --result 'em=1' must be DATASET.METRIC",
        ),
        (["publish", "a", ".", "--owner", "ann", "--alias", "A"], 1, "error: alias='A' has 'A'"),
        (["--wait", "-1", "list"], 1, "error: wait=-1.0 must be a number of at least 0"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_one_sentence_and_a_status(run, arguments, status, said):
    given, out, err = run(*arguments)
    assert (given, out) == (status, "") and err.startswith(said) and err.count("\n") == 1


def test_a_locked_registry_has_a_status_of_its_own(run, filled):
    with closing(sqlite3.connect(filled.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        status, _, err = run("--wait", "0.05", "rollback", "support@production")
    assert status == 4 and "is locked: another process is writing to it; try again" in err


def test_every_command_is_there_and_has_help(capsys):
    [choices] = [a.choices for a in make_parser()._actions if a.choices]
    assert set(choices) == set(COMMANDS)
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "exit status: 0 done" in capsys.readouterr().out


def test_a_registry_has_to_be_named(capsys, monkeypatch):
    monkeypatch.delenv("LABKIT_REGISTRY", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 2 and "give --registry FOLDER, or set LABKIT_REGISTRY" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_base_model_to_a_command_for_vllm(run, tmp_path):
    """With the tiny base: the door, as a user opens it, and an adapter that labkit saved."""
    root = tmp_path / "r"
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "labkit.registry",
            "init",
            "--base",
            "tiny-llama",
            "--forms",
            "float32",
            "nf4",
        ],
        env={**os.environ, "LABKIT_REGISTRY": str(root), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert made.returncode == 0 and made.stdout.startswith("a registry for adapters of tiny-llama is in "), (
        made.stderr
    )
    model, _ = load("tiny-llama", dtype="float32")
    folder = labkit.save_adapter(labkit.add_lora(model, labkit.LoRAConfig(r=4)), tmp_path / "a")
    done = run("publish", "support", folder, "--owner", "ann", "--alias", "production", registry=root)
    assert done[0] == 0 and done[1].startswith("support@v1 is in "), done
    status, out, _ = run("vllm", registry=root)
    assert status == 0 and shlex.split(out)[:3] == ["vllm", "serve", str(data_folder() / "tiny-llama")]
    status, _, err = run("init", "--base", "tiny-llama", registry=root)
    assert status == 1 and err.startswith("error: ") and "holds a registry, or the files of one" in err
