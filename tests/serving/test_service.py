"""What a server says when what it serves goes wrong behind it, and how much it keeps of what it measured."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from labkit import models
from labkit.serving.adapter_cache import CacheCounts
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.registry import Registry
from labkit.serving.requests import Completion
from labkit.serving.rows import EngineLimits
from tests.serving.registries import PROMPT, make_served_registry
from tests.serving.servers import TOKEN, running, until

pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")

from labkit.serving.metrics import Metrics
from labkit.serving.server import make_app
from labkit.serving.service import Service


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("behind")
    make_served_registry(made)
    (made / "folders").mkdir()
    shutil.copytree(made / "one", made / "folders" / "cut")
    shorten(made / "folders" / "cut" / "adapter_model.safetensors")
    return made


@pytest.fixture(scope="module")
def server(root):
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    engine = Engine(AdapterBank(model), {}, EngineLimits(rows=4))
    registry = Registry(root / "registry", wait=0.1)
    with running(
        make_app(Service(engine, tokenizer, "tiny-llama", registry, root / "folders"), TOKEN)
    ) as made:
        yield made


def shorten(path) -> bytes:
    """Cut the end of a file off; what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    return whole


def test_a_version_that_breaks_after_its_publication_is_422_until_it_is_whole_again(root, server):
    path = Registry(root / "registry").resolve("sql").path / "adapter_model.safetensors"
    path.chmod(0o644)
    whole = shorten(path)
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    done = server.post("/v1/completions", model="sql", **body)
    assert (done.status, done.body["error"]["code"]) == (422, "adapter_not_servable")
    assert str(root) not in done.body["error"]["message"]
    chunks = server.post("/v1/completions", model="sql", stream=True, **body).body
    assert "adapter_not_servable" in chunks and "[DONE]" not in chunks
    assert server.post("/v1/completions", model="support", **body).status == 200
    assert server.post("/v1/completions", model="tiny-llama", **body).status == 200
    path.write_bytes(whole)
    assert server.post("/v1/completions", model="sql", **body).status == 200


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_a_registry_that_cannot_be_read_is_503_until_it_can_and_the_base_goes_on(root, server, what):
    path = root / "registry" / "registry.sqlite"
    kept = path.rename(root / "kept")
    if what == "damaged":
        path.write_bytes(b"no database at all, but long enough" * 100)
    try:
        for asked in (
            server.post("/v1/completions", model="sql", prompt="a"),
            server.ask("GET", "/v1/models"),
        ):
            assert (asked.status, asked.body["error"]["code"]) == (503, "registry_unavailable")
            assert str(root) not in asked.body["error"]["message"]
        assert server.post("/v1/completions", model="tiny-llama", prompt="a").status == 200
    finally:
        kept.replace(path)
    assert server.post("/v1/completions", model="sql", prompt="a").status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_is_503_and_not_silence(root, monkeypatch):
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    engine = Engine(AdapterBank(model), {})

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(engine, "step", lambda: fail(MemoryError("no memory at all")))
    monkeypatch.setattr(engine, "end_all", fail)
    with running(make_app(Service(engine, tokenizer, "tiny-llama"), TOKEN)) as dead:
        until(lambda: dead.ask("GET", "/health", headers={}).status == 503)
        asked = dead.post("/v1/completions", model="tiny-llama", prompt="a")
        assert (asked.status, asked.body["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize("path, status", [("/etc", 403), ("../one", 403), ("nothing", 404), ("cut", 400)])
def test_a_refused_path_says_nothing_of_the_servers_folders(root, server, path, status):
    done = server.post("/v1/load_lora_adapter", lora_name="draft", lora_path=path)
    assert done.status == status and done.body["error"]["message"]
    assert str(root) not in str(done.body)


def test_the_series_of_versions_are_bounded_and_the_one_used_last_stays():
    cache = SimpleNamespace(counts=CacheCounts(), nbytes=0)
    metrics = Metrics(SimpleNamespace(adapters=cache), series=3)
    answer = Completion((), "stop", None, 4, 0, queued=0.0, first_token=0.5, finished=1.0)
    for number in range(1, 50):
        metrics.count(f"support@v{number}", answer)
        metrics.count("sql@v1", answer)
    metrics.refuse("unknown", "model_not_found")
    counted = {
        name: {
            sample.labels["adapter"]: sample.value
            for sample in getattr(metrics, name).collect()[0].samples
            if sample.name.endswith(("_total", "_count"))
        }
        for name in ("requests", "read", "latency", "first")
    }
    assert counted["requests"] == {"support@v49": 1, "sql@v1": 49, "unknown": 1}
    assert counted["read"] == {"support@v49": 4, "sql@v1": 49 * 4}
    assert counted["latency"] == counted["first"] == {"support@v49": 1, "sql@v1": 49}
