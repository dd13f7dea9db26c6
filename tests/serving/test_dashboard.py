"""The dashboard's page and state, without a browser: `tests/browser/test_dashboard.py` has one."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from labkit import models
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.rows import EngineLimits
from tests.serving.registries import ALIASES, FOLDERS, PROMPT, make_served_registry
from tests.serving.servers import TOKEN, running

pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")

from labkit.serving import dashboard
from labkit.serving.server import make_app
from labkit.serving.service import Service


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return make_served_registry(tmp_path_factory.mktemp("shown"))


@pytest.fixture(scope="module")
def server(registry):
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    engine = Engine(AdapterBank(model), {}, EngineLimits(rows=4, queue=9))
    with running(make_app(Service(engine, tokenizer, "tiny-llama", registry), TOKEN)) as made:
        yield made


def test_the_page_needs_no_token_and_its_state_does(server):
    page = server.ask("GET", "/dashboard", headers={})
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert server.ask("GET", "/v1/state", headers={}).status == 401


def test_the_policy_lets_its_own_script_run_and_nothing_else(server):
    page = server.ask("GET", "/dashboard", headers={})
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    for directive in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[directive])


def test_the_page_has_nothing_from_elsewhere_and_sets_no_html():
    page = dashboard.PAGE
    assert not re.search(
        r"https?:|//[a-z]|\burl\(|@import|\bsrc=|<link(?! rel=\"icon\" href=\"data:,\")", page
    )
    for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert risky not in page
    assert not re.search(r"\son[a-z]+=|\sstyle=", page), "the policy would refuse it"


def test_the_state_says_what_is_served_and_what_is_in_memory(server):
    before = server.ask("GET", "/v1/state").body
    assert (before["base"], before["seconds"], before["registry_problem"]) == ("tiny-llama", None, "")
    assert server.post("/v1/completions", model="sql", prompt=PROMPT, max_tokens=3, user="ann").status == 200
    assert server.post("/v1/completions", model="nobody", prompt=PROMPT).status == 404
    state = server.ask("GET", "/v1/state").body
    assert state["totals"] == {"answers": 2, "tokens": 3}
    assert state["outcomes"] == {"length": 1, "model_not_found": 1}
    assert state["seconds"]["p50"] >= state["first_token"]["p50"] > 0
    assert state["requests"] == {"writing": 0, "rows": 4, "waiting": 0, "queue": 9}
    assert (state["cache"]["adapters"], state["cache"]["misses"], state["cache"]["budget"]) == (1, 1, 2**28)
    shown = {row["label"]: row for row in state["adapters"]}
    assert set(shown) == set(FOLDERS) and state["adapters"][0]["label"] == "sql@v1", "in memory: first"
    assert shown["sql@v1"]["bytes"] == state["cache"]["bytes"] > 0 and shown["support@v1"]["bytes"] is None
    pointed = {f"{name.partition('@')[0]}@{a}": name for name, row in shown.items() for a in row["aliases"]}
    assert pointed == ALIASES


def test_an_alias_that_moves_is_shown_at_once(server, registry):
    registry.set_alias("support@staging", 1)
    shown = {row["label"]: row["aliases"] for row in server.ask("GET", "/v1/state").body["adapters"]}
    assert shown == {"sql@v1": ["production"], "support@v1": ["production", "staging"], "support@v2": []}
    registry.rollback("support@staging")


def test_a_registry_that_cannot_be_read_is_said_and_the_rest_is_shown(server, registry):
    kept = registry.path.rename(registry.root / "kept")
    try:
        state = server.ask("GET", "/v1/state").body
        assert "cannot" in state["registry_problem"] or "no such" in state["registry_problem"].lower()
        assert str(registry.root) not in state["registry_problem"]
        assert state["adapters"] == [] and state["base"] == "tiny-llama"
    finally:
        kept.replace(registry.path)


def test_many_versions_are_shown_in_part_the_ones_in_use_first():
    version = SimpleNamespace(owner="o" * 10_000, note="n")
    found = [SimpleNamespace(**vars(version), label=f"a@v{n}", content="c") for n in range(1, 1001)]
    service = SimpleNamespace(registry_read=nullcontext, lock=nullcontext(), loaded={}, rollouts=None)
    shown = dashboard.adapters_of(
        service, SimpleNamespace(now=lambda: (found, {"a@production": 900})), {"a@v950 c": 7}
    )
    labels = [row["label"] for row in shown["adapters"]]
    assert labels[:3] == ["a@v950", "a@v900", "a@v1"] and shown["more"] == 800
    assert len(shown["adapters"]) == 200 and len(shown["adapters"][0]["owner"]) == 200
