"""Trials through a real engine and over HTTP: what is sent, what the shadow may not harm, and what feedback answers."""

import json
import random
import shutil

import pytest
import torch

import labkit
from labkit import models
from labkit.doctor.specimens import adapted, fed_batches, held_records, teach, train_records, trained
from labkit.serving.adapter_cache import AdapterCache
from labkit.serving.admission import Base
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.registry import Registry
from labkit.serving.rollout import Rollouts
from labkit.serving.rows import EngineLimits
from labkit.serving.trial import CANDIDATE
from labkit.serving.trial_log import explain
from tests.serving.engines import AtOnce, finish
from tests.serving.registries import PROMPT, make_served_registry, written_alone
from tests.serving.servers import TOKEN, running

pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")

from labkit.serving.protocol import CompletionBody
from labkit.serving.server import make_app
from labkit.serving.service import Service
from labkit.serving.trial_options import GoldJudge

ALIAS = "support@production"
TOKENS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_served_registry(root)
    return root


@pytest.fixture(scope="module")
def texts(made):
    return written_alone(made, TOKENS)


@pytest.fixture
def registry(made, tmp_path):
    shutil.copytree(made / "registry", tmp_path / "registry", symlinks=True)
    return Registry(tmp_path / "registry")


@pytest.fixture
def serve(registry):
    """Makes a service over the registry, whose engine is stepped by hand, or runs in a server."""
    opened = []

    def serve_(judge=None, **limits) -> Service:
        rollouts = Rollouts(registry, judge, worker=AtOnce())
        opened.append(rollouts)
        model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
        bank = AdapterBank(model)
        engine = Engine(bank, {}, EngineLimits(**limits), AdapterCache(bank, 2**28, AtOnce()))
        return Service(engine, tokenizer, "tiny-llama", registry, rollouts=rollouts)

    yield serve_
    for rollouts in opened:
        rollouts.held.close()


def ask(
    service: Service, id: str, user: str, model="support", prompt=PROMPT, tokens=TOKENS, run=True
) -> list:
    """One request; the pieces and the end that are sent to the client, once the engine has run."""
    sent: list = []
    body = CompletionBody(model=model, prompt=prompt, user=user, max_tokens=tokens, temperature=0)
    service.submit(body, lambda index, event: sent.append(event), id)
    if run:
        finish(service.engine)
    return sent


def text(sent: list) -> str:
    return "".join(event for event in sent if isinstance(event, str))


def users(service: Service, arm: str, number: int) -> list[str]:
    """Users of that arm."""
    trial = service.rollouts.records[ALIAS].trial
    return [user for user in map(str, range(1000)) if trial.route(user)[0] == arm][:number]


def break_files(registry: Registry, label: str) -> None:
    """Spoil the files of a version that is published, as a disk may."""
    weights = registry.resolve(label).path / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-100])


def test_each_user_is_sent_what_the_version_of_the_arm_writes(serve, registry, texts):
    service = serve()
    service.rollouts.start(ALIAS, 2, share=0.5)
    for arm, label in (("control", "support@v1"), (CANDIDATE, "support@v2")):
        for user in users(service, arm, 2):
            assert text(ask(service, f"{arm} {user}", user)) == texts[label]
            assert f"{label} wrote it (length)" in explain(registry.root, f"{arm} {user}")
    assert text(ask(service, "other", "0", model="sql")) == texts["sql@v1"]


def test_feedback_over_http_counts_once_and_only_for_answers_that_were_given(serve):
    service = serve()
    service.rollouts.start(ALIAS, 2)
    with running(make_app(service, TOKEN)) as server:
        request = {"model": "support", "prompt": PROMPT, "max_tokens": 2, "user": "ann"}
        id = server.post("/v1/completions", **request).body["id"]
        given = server.post("/v1/feedback", id=id, score=1)
        assert (given.status, given.body) == (200, {"object": "feedback", "id": id, "counted": True})
        assert server.post("/v1/feedback", id=id, score=0).status == 409
        assert server.post("/v1/feedback", id="cmpl-invented", score=1).status == 404
        chat = server.post("/v1/completions", **request | {"model": "sql"}).body["id"]
        assert server.post("/v1/feedback", id=chat, score=0.5).body["counted"] is False
        for wrong in (-1, 1.5, "1", True, None, [1], {"a": 1}):
            assert server.post("/v1/feedback", id=id, score=wrong).status == 400, wrong
        assert server.post("/v1/feedback", score=1).status == 400
        assert (
            server.post("/v1/feedback", id=id, score=1, why="x").body["error"]["code"]
            == "unsupported_parameter"
        )
        assert server.ask("POST", "/v1/feedback", b'{"id": "a", "score": NaN}').status == 400
        assert server.ask("POST", "/v1/feedback", {"id": id, "score": 1}, {}).status == 401
        [trial] = server.ask("GET", "/v1/rollouts").body["data"]
        assert sum(trial["scores"].values()) == 1 and trial["verdict"] == ""


def test_a_server_without_a_registry_has_no_trials(serve):
    service = serve()
    service.rollouts = None
    with running(make_app(service, TOKEN)) as server:
        id = server.post("/v1/completions", model="support", prompt=PROMPT, max_tokens=1).body["id"]
        assert server.post("/v1/feedback", id=id, score=1).body["error"]["code"] == "no_rollouts"
        assert server.ask("GET", "/v1/rollouts").status == 404


def test_a_candidate_that_cannot_be_loaded_is_rolled_back_by_itself(serve, registry, texts):
    service = serve()
    service.rollouts.start(ALIAS, 2, share=0.5, least=5)
    break_files(registry, "support@v2")
    n = 0
    while not service.rollouts.records[ALIAS].trial.is_over:
        [*_, end] = ask(service, f"a{n}", f"user-{n}", tokens=1)
        if end.finish_reason != "error":
            service.rollouts.feedback(f"a{n}", 1)
        n += 1
    assert n < 60 and registry.aliases("support")[ALIAS] == 1
    assert text(ask(service, "next", users(service, CANDIDATE, 1)[0])) == texts["support@v1"]


def test_a_shadow_answers_unseen(serve, registry, texts):
    service = serve(GoldJudge({PROMPT: texts["support@v1"]}))
    service.rollouts.start(ALIAS, 2, mode="shadow", share=1.0)
    assert text(ask(service, "a", "ann")) == texts["support@v1"]
    assert service.rollouts.records[ALIAS].trial.totals == {"control": 1.0, "candidate": 0.0}
    assert "support@v2 wrote one that was not sent (length)" in explain(registry.root, "a")


def test_a_shadow_that_cannot_be_loaded_harms_no_answer_and_counts_as_wrong(serve, registry, texts):
    service = serve(GoldJudge({PROMPT: texts["support@v1"]}))
    service.rollouts.start(ALIAS, 2, mode="shadow", share=1.0)
    break_files(registry, "support@v2")
    assert text(ask(service, "a", "ann")) == texts["support@v1"]
    assert service.rollouts.records[ALIAS].trial.totals == {"control": 1.0, "candidate": 0.0}
    assert "was not sent (error)" in explain(registry.root, "a")


def test_a_busy_server_leaves_the_shadow_out_and_a_client_that_hangs_up_takes_it_along(serve, texts):
    service = serve(GoldJudge({PROMPT: "?"}), queue=4, rows=1)
    service.rollouts.start(ALIAS, 2, mode="shadow", share=1.0)
    sent = [ask(service, f"a{n}", f"user-{n}", run=False) for n in range(3)]
    assert len(service.engine.waiting) == 4  # of the three, only the first has a shadow
    assert [service.rollouts.known[f"a{n}"].stream is not None for n in range(3)] == [True, False, False]
    finish(service.engine)
    assert {text(one) for one in sent} == {texts["support@v1"]}
    body = CompletionBody(model="support", prompt=PROMPT, user="x", max_tokens=TOKENS, temperature=0)
    [stream] = service.submit(body, lambda index, event: None, "gone")
    shadow = service.rollouts.known["gone"].stream
    stream.cancel()
    finish(service.engine)
    assert service.rollouts.known["gone"].stream is None
    assert shadow.result(0).finish_reason == "cancelled"


def publish(registry: Registry, model, root, name: str) -> int:
    labkit.save_adapter(model, root / name)
    return registry.publish("orders", root / name, "ann").number


@pytest.mark.slow
def test_an_adapter_trained_on_shuffled_labels_is_rolled_back_by_its_users(tmp_path):
    """All of it is real: two trainings, a registry, the engine, and users who know the right answers."""
    right = train_records()
    labels = [record["completion"] for record in right]
    random.Random(0).shuffle(labels)
    poisoned = adapted(0)
    teach(poisoned, fed_batches([r | {"completion": c} for r, c in zip(right, labels)], 0, 12))
    base, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    registry = Registry.create(tmp_path / "registry", Base.of("tiny-llama", base))
    publish(registry, trained(0)[0], tmp_path, "good")
    publish(registry, poisoned, tmp_path, "poisoned")
    registry.set_alias("orders@production", 1, "ann")
    rollouts = Rollouts(registry, worker=AtOnce())
    trial = rollouts.start("orders@production", 2, "ann", "cheaper labels", share=0.2)
    service = Service(Engine(AdapterBank(base), {}), tokenizer, "tiny-llama", registry, rollouts=rollouts)
    chance, held = random.Random(1), [*held_records(), *right]
    asked = 0
    while not trial.is_over and asked < 400:
        batch = [(f"a{asked + n}", chance.choice(held)) for n in range(8)]
        sent = {
            id: ask(service, id, f"user of {id}", "orders", record["prompt"], 10, run=False)
            for id, record in batch
        }
        finish(service.engine)
        for id, record in batch:
            rollouts.feedback(id, float(text(sent[id]).strip() == record["completion"].strip()))
        asked += len(batch)
    rollouts.close()
    numbers = trial.numbers()
    assert (
        trial.verdict == "roll back" and numbers["means"][CANDIDATE] < 0.1 < 0.4 < numbers["means"]["control"]
    )
    assert registry.aliases("orders") == {"orders@production": 1}
    assert (
        json.loads((registry.root / "rollouts/orders@production.jsonl").read_text().splitlines()[-1])["kind"]
        == "settled"
    )
