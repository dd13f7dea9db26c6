"""The server over HTTP: with OpenAI's own client, and with requests that no client sends."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit import models
from labkit.serving.admission import Base
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.registry import Registry
from labkit.serving.rows import EngineLimits
from tests.serving.adapters import CONFIGS, make_folder
from tests.serving.servers import HEADERS, TOKEN, running, until

pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")

from labkit.serving.server import make_app
from labkit.serving.service import Service

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PROMPT = "The old lamp"


class World:
    """A registry with two versions of support and one of sql, and a server over it."""

    def __init__(self, root):
        self.model, self.tokenizer = models.load("tiny-llama", dtype=torch.float32)
        self.tokenizer.chat_template = TEMPLATE
        self.folders = root / "folders"
        for seed, name in enumerate(("one", "two", "draft")):
            make_folder(self.model, self.folders / name, CONFIGS["support"], seed)
        make_folder(self.model, self.folders / "sql", CONFIGS["sql"], 3)
        self.registry = Registry.create(root / "registry", Base.of("tiny-llama", self.model))
        for name, folder in (("support", "one"), ("support", "two"), ("sql", "sql")):
            self.registry.publish(name, self.folders / folder, "ann")
        self.registry.set_alias("support@production", 1)

    def service(self, **limits) -> Service:
        model, _ = models.load("tiny-llama", dtype=torch.float32)
        engine = Engine(AdapterBank(model), {}, EngineLimits(**limits))
        return Service(engine, self.tokenizer, "tiny-llama", self.registry, self.folders)

    def greedy(self, adapter: str | None, tokens: int = 12) -> str:
        """What transformers writes, with the adapter loaded by `labkit.load_adapter`."""
        import labkit

        model, _ = models.load("tiny-llama", dtype=torch.float32)
        if adapter is not None:
            labkit.load_adapter(model, self.folders / adapter)
        ids = self.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def service(world):
    return world.service(rows=4)


@pytest.fixture(scope="module")
def server(service):
    with running(make_app(service, TOKEN, largest=20_000, body_seconds=1.0)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="openai is not installed here: pip install openai")
    return openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0)


def write(client, model, **others):
    others = {"max_tokens": 12, "temperature": 0} | others
    return client.completions.create(model=model, prompt=PROMPT, **others)


@pytest.mark.parametrize(
    "model, folder",
    [("tiny-llama", None), ("support", "one"), ("support@v2", "two"), ("sql@v1", "sql")],
)
def test_each_name_writes_what_its_adapter_writes_alone(world, client, model, folder):
    answer = write(client, model)
    assert answer.choices[0].text == world.greedy(folder)
    assert (answer.model, answer.choices[0].finish_reason, answer.usage.completion_tokens) == (
        model,
        "length",
        12,
    )


def test_the_models_are_the_base_and_the_names_below_it(client):
    parents = {model.id: model.parent for model in client.models.list()}
    assert parents == {"tiny-llama": None} | dict.fromkeys(
        ["support@v1", "support@v2", "support@production", "sql@v1"], "tiny-llama"
    )
    assert client.models.retrieve("support@v2").id == "support@v2"


@pytest.mark.parametrize(
    "model", ["suport", "support@staging", "support@v9", "sql", "Support", "../support", ""]
)
def test_an_unknown_name_is_404_and_never_the_base(client, model):
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        write(client, model)
    assert caught.value.code == "model_not_found"


def test_an_alias_that_moves_changes_the_next_answer(world, client):
    world.registry.set_alias("support@production", 2)
    assert write(client, "support").choices[0].text == world.greedy("two")
    world.registry.rollback("support@production")
    assert write(client, "support").choices[0].text == world.greedy("one")


def test_a_stream_is_the_same_text_in_pieces(client):
    chunks = list(write(client, "support", stream=True, stream_options={"include_usage": True}))
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == write(client, "support").choices[0].text
    assert len(texts) > 4 and chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_a_chat_is_rendered_by_the_template_whole_and_in_pieces(world, client):
    asked = {"model": "support", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=8).choices[0].message
    rendered = client.completions.create(
        model="support", prompt="user: hello\nassistant:", max_tokens=8, temperature=0
    )
    assert (whole.role, whole.content) == ("assistant", rendered.choices[0].text)
    pieces = client.chat.completions.create(**asked, max_completion_tokens=8, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.content


def test_a_stop_word_ends_the_text_before_it_also_in_pieces(client):
    text = write(client, "support").choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = write(client, "support", stop=[stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.find(stop)], "stop")
    pieces = write(client, "support", stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text[: text.find(stop)]


def test_answers_are_drawn_by_seed_and_differ_within_a_request(client):
    drawn = [write(client, "support", temperature=1, seed=7, n=3) for _ in range(2)]
    texts = [[choice.text for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert drawn[0].usage.completion_tokens == sum(12 for _ in range(3))


def test_an_adapter_is_loaded_by_path_served_and_unloaded(world, server, client):
    done = server.post("/v1/load_lora_adapter", lora_name="draft", lora_path=str(world.folders / "draft"))
    assert (done.status, done.body) == (200, "Success: LoRA adapter 'draft' added successfully.")
    assert write(client, "draft").choices[0].text == world.greedy("draft")
    again = server.post("/v1/load_lora_adapter", lora_name="draft", lora_path="draft")
    assert (again.status, again.body["error"]["code"]) == (400, "name_taken")
    assert server.post("/v1/unload_lora_adapter", lora_name="draft").status == 200
    assert server.post("/v1/unload_lora_adapter", lora_name="draft").status == 404
    assert server.post("/v1/completions", model="draft", prompt="a").status == 404


def broken(world, kind):
    """The folder of an adapter that must not be served."""
    folder = world.folders / kind
    shutil.copytree(world.folders / "draft", folder, dirs_exist_ok=True)
    if kind == "nan":
        tensors = load_file(folder / "adapter_model.safetensors")
        next(iter(tensors.values())).fill_(float("nan"))
        save_file(tensors, folder / "adapter_model.safetensors")
    if kind == "other-base":
        path = folder / "labkit.json"
        said = json.loads(path.read_text())
        said["base"]["linears"] = "0" * 64
        path.write_text(json.dumps(said))
    if kind == "corrupt":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "dora":
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    return str(folder)


@pytest.mark.parametrize("kind", ["nan", "other-base", "corrupt", "dora"])
def test_an_adapter_that_cannot_be_served_is_refused_with_the_reason(world, server, kind):
    done = server.post("/v1/load_lora_adapter", lora_name=kind, lora_path=broken(world, kind))
    assert (done.status, done.body["error"]["code"]) == (400, "adapter_not_servable")
    assert server.post("/v1/completions", model=kind, prompt="a").status == 404


@pytest.mark.parametrize(
    "name, path, status",
    [
        ("a", "../registry", 403),
        ("a", "/etc", 403),
        ("a", "nothing", 404),
        ("A/b", "draft", 400),
        ("sql", "draft", 400),
    ],
)
def test_a_path_outside_or_a_name_that_is_taken_is_refused(server, name, path, status):
    assert server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path).status == status


@pytest.mark.parametrize(
    "change",
    [
        {"n": 0},
        {"n": True},
        {"n": 1000},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"stop": 7},
        {"stop": [1, 2]},
        {"stop": ["a"] * 5},
        {"stop": [""]},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"prompt": {"text": "a"}},
        {"prompt": "a " * 5000},
        {"max_tokens": 0},
        {"max_tokens": 10**6},
        {"seed": -1},
        {"strength": 1e9},
        {"model": None},
        {"logit_bias": {"1": 5}},
        {"best_of": 3},
    ],
    ids=lambda change: json.dumps(change)[:30],
)
def test_a_field_that_is_wrong_is_400_and_says_so(server, change):
    body = {"model": "support", "prompt": "a", "max_tokens": 2} | change
    done = server.ask("POST", "/v1/completions", body)
    assert done.status == 400 and done.body["error"]["message"], done
    assert done.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "sent, status",
    [(b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b" " * 30_000, 413)],
    ids=["empty", "cut off", "a list", "null", "no text", "huge"],
)
def test_a_body_that_is_no_request_is_refused(server, sent, status):
    done = server.ask("POST", "/v1/completions", sent)
    assert done.status == status and done.body["error"]["message"]


def test_a_body_in_chunks_that_never_ends_or_is_huge_is_refused(server):
    import socket

    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for body, status in ((b"1\r\n{\r\n", b" 408 "), (b"7530\r\n" + b" " * 30_000 + b"\r\n", b" 413 ")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head.encode() + body)
            assert status in connection.recv(100)


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer ", "Basic sesame", "Bearer sesame2", "Bearer ſesame"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing"])
def test_without_the_token_nothing_is_said(server, given, path):
    headers = {} if given is None else {"Authorization": given.encode()}
    done = server.ask("GET", path, headers=headers)
    assert (done.status, done.body["error"]["code"]) == (401, "invalid_api_key")


def test_health_needs_no_token_and_unknown_routes_are_404(server):
    assert server.ask("GET", "/health", headers={}).body == {"status": "ok"}
    assert server.ask("GET", "/v1/nothing").status == 404
    assert server.ask("GET", "/v1/completions").status == 405


def metric(server, start):
    text = server.ask("GET", "/metrics").body
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(start))


def test_metrics_count_answers_and_tokens_by_adapter_and_errors(server, client):
    mine = 'labkit_completion_tokens_total{adapter="sql@v1"}'
    failed = 'labkit_requests_total{adapter="unknown",outcome="model_not_found"}'
    before = metric(server, mine), metric(server, failed)
    write(client, "sql@v1")
    server.post("/v1/completions", model="invented", prompt="a")
    assert (metric(server, mine) - before[0], metric(server, failed) - before[1]) == (12, 1)
    assert metric(server, 'labkit_request_seconds_count{adapter="sql@v1"}') > 0
    assert metric(server, "labkit_adapter_hits_total") > 0
    assert "invented" not in server.ask("GET", "/metrics").body


@pytest.mark.parametrize("stream", [True, False], ids=["in mid-stream", "while waiting for the whole"])
def test_a_client_that_hangs_up_has_its_request_cancelled(world, server, service, stream):
    cancelled = 'labkit_requests_total{adapter="support@v2",outcome="cancelled"}'
    before = metric(server, cancelled)
    connection = server.open(model="support@v2", prompt="a", max_tokens=400, stream=stream)
    if stream:
        assert connection.recv(10)
    until(lambda: service.engine.writing)
    connection.close()
    until(lambda: metric(server, cancelled) == before + 1)
    until(lambda: service.engine.is_idle)


def test_a_slow_reader_holds_up_nobody(server, client):
    with server.open(model="support", prompt="a", max_tokens=300, stream=True):  # never read
        assert write(client, "sql@v1").choices[0].finish_reason == "length"


def test_a_full_queue_is_429_and_a_drained_server_503_and_what_runs_is_finished(world):
    service = world.service(rows=1, queue=1)
    with running(make_app(service, TOKEN)) as server:
        taken = server.open(model="support", prompt="a", max_tokens=300)
        until(lambda: service.engine.writing)
        waiting = server.open(model="support", prompt="b", max_tokens=3)
        until(lambda: len(service.engine.waiting) == 1)
        full = server.post("/v1/completions", model="support", prompt="c")
        assert (full.status, full.headers["retry-after"]) == (429, "1")
        assert full.body["error"]["type"] == "rate_limit_error"
        service.engine.drain()
        assert server.post("/v1/completions", model="support", prompt="d").status == 503
        assert server.ask("GET", "/health").status == 503
        for connection in (taken, waiting):
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
            connection.close()


def test_an_answer_that_takes_too_long_is_504(world):
    service = world.service(rows=1, seconds=0.001)
    with running(make_app(service, TOKEN)) as server:
        done = server.post("/v1/completions", model="support", prompt="a", max_tokens=300)
        assert (done.status, done.body["error"]["code"]) == (504, "timeout")


def test_a_server_without_a_folder_loads_nothing_and_one_without_a_token_does_not_start(world, service):
    closed = Service(service.engine, world.tokenizer, "tiny-llama")
    with pytest.raises(Exception, match="loads no adapters by path"):
        closed.load("a", "draft")
    service.engine.resolve = service.resolve
    with pytest.raises(ValueError, match="the token is empty"):
        make_app(service, " ")
    assert HEADERS["Authorization"].endswith(TOKEN)
