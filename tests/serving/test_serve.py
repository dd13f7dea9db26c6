"""`python -m labkit.serve`: as a process that clients speak to, and what it says when it cannot begin."""

import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import serve
from tests.serving.cases import make_registry
from tests.serving.registries import ALIASES, PROMPT, make_served_registry, written_alone
from tests.serving.servers import TOKEN

pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")

from tests.serving.processes import PATIENCE, serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a registry, and beside it the folders that were published."""
    made = tmp_path_factory.mktemp("served")
    make_served_registry(made)
    return made


@pytest.fixture(scope="module")
def process(root):
    with serving(root / "log", "--registry", str(root / "registry"), "--drain", "1000") as made:
        yield made


def ask_for_stream(process, tokens: int) -> socket.socket:
    """A connection on which an answer has begun to come."""
    connection = process.open(model="sql", prompt=PROMPT, max_tokens=tokens, temperature=0, stream=True)
    connection.settimeout(PATIENCE)
    assert connection.recv(1)
    return connection


def test_openais_client_is_answered_by_each_adapter_and_alias(process, root):
    openai = pytest.importorskip("openai", reason="openai is not installed here: pip install openai")
    client = openai.OpenAI(base_url=process.url, api_key=TOKEN, max_retries=0)
    alone = written_alone(root)
    names = {"support": "support@v1", "sql": "sql@v1"} | ALIASES | {name: name for name in alone}
    for name, meant in names.items():
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        assert answer.choices[0].text == alone[meant], name
    assert len(set(alone.values())) == len(alone), "adapters that write the same show nothing"
    assert {model.id for model in client.models.list()} == set(alone) | set(ALIASES)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="suport", prompt=PROMPT)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=process.url, api_key="wrong", max_retries=0).models.list()


def test_the_log_says_neither_the_token_nor_a_text(process):
    process.post("/v1/completions", model="sql", prompt="the secret of the lamp", max_tokens=2)
    log = process.log.read_text()
    assert "POST /v1/completions" in log and TOKEN not in log and "secret" not in log


def test_the_guide_names_every_option_and_every_metric(process):
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    options = {option for action in serve.make_parser()._actions for option in action.option_strings}
    assert {option for option in options - {"-h", "--help"} if f"`{option}" not in guide} == set()
    text = process.ask("GET", "/metrics").body
    named = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    named = {name for name in named if not name.endswith("_created")}
    assert named and {name for name in named if f"`{name}`" not in guide} == set()


def test_a_port_that_is_taken_is_one_line_and_exit_status_1(process, root):
    command = [sys.executable, "-m", "labkit.serve", "--port", str(process.port), "--token", TOKEN]
    done = subprocess.run([*command, "--registry", str(root / "registry")], capture_output=True, text=True)
    said = f"error: port {process.port} of 127.0.0.1 is in use; give another --port, or 0 for any\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--registry", "nowhere"], "there is no registry in .*nowhere"),
        ([], "give --registry, or --base"),
        (["--base", "no-such-model"], "no-such-model"),
        (["--base", "tiny-llama", "--token", " "], "no token; set LABKIT_TOKEN"),
        (["--base", "tiny-llama", "--token", "", "--host", "0.0.0.0"], "no token; set LABKIT_TOKEN"),
        (["--base", "tiny-llama", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 0 cannot be used"),
        (["--base", "tiny-llama", "--host", "no such host"], "--host no such host is no address"),
        (["--base", "tiny-llama", "--port", "70000"], "port=70000"),
        (["--base", "tiny-llama", "--port", "-1"], "port=-1"),
        (["--base", "tiny-llama", "--rows", "0"], "rows=0"),
        (["--base", "tiny-llama", "--queue", "0"], "queue=0"),
        (["--base", "tiny-llama", "--seconds", "nan"], "seconds=nan"),
        (["--base", "tiny-llama", "--budget", "0"], "budget=0"),
        (["--base", "tiny-llama", "--drain", "-1"], "drain=-1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_an_error_in_words(never, arguments, said):
    check_refused(["--port", "0", "--token", TOKEN, *arguments], said)


@pytest.fixture
def never(monkeypatch):
    """A server that begins all the same would not end."""
    monkeypatch.delenv("LABKIT_REGISTRY", raising=False)
    monkeypatch.setattr(serve, "run", lambda *_: pytest.fail("it serves"))


def check_refused(arguments: list[str], said: str) -> None:
    """What `main` ends with is a text, which Python prints to exit with status 1."""
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("error: ")
    assert re.search(said, ended.value.code), ended.value.code


def test_a_registry_of_a_newer_labkit_or_of_another_base_or_damaged_is_refused_and_left(
    never, root, tmp_path
):
    for name, statement in (("newer", "PRAGMA user_version = 99"), ("foreign", "PRAGMA application_id = 7")):
        shutil.copytree(root / "registry", tmp_path / name, symlinks=True)
        with sqlite3.connect(tmp_path / name / "registry.sqlite") as db:
            db.execute(statement)
    shutil.copytree(root / "registry", tmp_path / "damaged", symlinks=True)
    (tmp_path / "damaged" / "registry.sqlite").write_bytes(b"no database at all, but long enough" * 100)
    make_registry(tmp_path / "other")
    said = {
        "newer": "written by a newer labkit",
        "foreign": "not a registry of labkit",
        "damaged": "is damaged",
        "other": "are for small, and tiny-llama is another model",
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, words in said.items():
        arguments = ["--registry", str(tmp_path / name), "--base", "tiny-llama", "--port", "0"]
        check_refused([*arguments, "--token", TOKEN], words)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_only_an_address_that_others_reach_is_warned_of(capsys):
    for host in ("127.0.0.1", "::1", "localhost"):
        serve.announce(host, 80)
    assert capsys.readouterr().err == ""
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        serve.announce(host, 80)
        assert "put a proxy with TLS before it" in capsys.readouterr().err, host


def test_a_signal_finishes_the_streams_and_the_exit_status_is_0(process):
    with ask_for_stream(process, 200) as connection:
        process.popen.send_signal(signal.SIGTERM)
        text = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert process.popen.wait(PATIENCE) == 0
    assert b"data: [DONE]" in text
    chunks = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith('data: {"')]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "Traceback" not in process.log.read_text()
