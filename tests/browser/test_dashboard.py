"""The dashboard in a real browser: the token, the numbers, texts that want to be HTML, narrow and dark."""

import threading

import pytest
import torch

from labkit import models
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.rows import EngineLimits
from tests.browser.jupyter import CHROMIUM, NO_BROWSER
from tests.serving.registries import PROMPT, make_served_registry
from tests.serving.servers import TOKEN, running

pytest.importorskip("playwright", reason="playwright is not installed here: pip install playwright")
pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")

from playwright.sync_api import expect

from labkit.serving.server import make_app
from labkit.serving.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)]

SOON = 120_000  # ms
EVIL = "<img src=x onerror=\"document.title = 'taken'\"><script>document.title = 'taken'</script>"


class World:
    """A server whose engine stands still while `gate` is closed, with a version whose owner and note are HTML."""

    def __init__(self, root):
        self.registry = make_served_registry(root)
        self.registry.publish("sql", root / "sql", f"ann {EVIL}", f"note {EVIL}")
        model, self.tokenizer = models.load("tiny-llama", dtype=torch.float32)
        self.engine = Engine(AdapterBank(model), {}, EngineLimits(rows=2, queue=5))
        self.gate, step = threading.Event(), self.engine.step
        self.gate.set()
        self.engine.step = lambda: self.gate.wait() and step()
        self.app = make_app(Service(self.engine, self.tokenizer, "tiny-llama", self.registry), TOKEN)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("dashboard"))


@pytest.fixture(scope="module")
def server(world):
    with running(world.app) as made:
        yield made
        world.gate.set()


@pytest.fixture
def page(browser, server):
    """The page, before a token is given."""
    made = browser.new_page(viewport={"width": 1200, "height": 1400})
    made.goto(f"http://127.0.0.1:{server.port}/dashboard")
    yield made
    made.close()


def sign_in(page) -> None:
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.get_by_text("serving", exact=True).wait_for(timeout=SOON)


def shows(page, table: str, head: str, count: str) -> None:
    """Wait until the one cell beside `head` says `count`; a failure says what it says instead."""
    expect(row(page, table, head).locator("td")).to_have_text(count, timeout=SOON)


def row(page, table: str, head: str):
    return page.locator(f"#{table} tr", has=page.get_by_role("rowheader", name=head, exact=True))


def test_the_token_is_asked_for_taken_by_keyboard_and_kept_in_the_tab_alone(page):
    elsewhere = []
    page.on("request", lambda one: elsewhere.append(one.url) if "127.0.0.1" not in one.url else None)
    field = page.get_by_label("Token", exact=True)
    field.wait_for(timeout=SOON)
    assert (
        field.evaluate("one => one === document.activeElement") and field.get_attribute("type") == "password"
    )
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("did not accept this token").wait_for(timeout=SOON)
    assert page.evaluate("sessionStorage.length") == 0
    sign_in(page)
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.reload()
    page.get_by_text("serving", exact=True).wait_for(timeout=SOON)
    assert TOKEN not in page.content() and TOKEN not in page.url
    page.get_by_role("button", name="Forget token").press("Enter")
    page.get_by_text("The token is gone from this tab.").wait_for(timeout=SOON)
    assert page.evaluate("sessionStorage.length") == 0 and not page.locator("#shown").is_visible()
    assert elsewhere == []


def test_it_shows_adapters_answers_errors_and_who_waits(page, world, server):
    sign_in(page)
    assert page.get_by_role("heading", level=1).inner_text() == "tiny-llama"
    assert "production" in row(page, "adapters", "support@v1").inner_text()
    for _ in range(3):
        assert server.post("/v1/completions", model="support@v1", prompt=PROMPT, max_tokens=4).status == 200
    server.post("/v1/completions", model="nobody", prompt=PROMPT)
    shows(page, "outcomes", "length", "3")
    assert row(page, "outcomes", "model_not_found").inner_text().split() == ["model_not_found", "1"]
    assert "KiB" in row(page, "adapters", "support@v1").inner_text()
    assert "12 since the start" in page.locator("#tiles").inner_text()
    page.get_by_role("button", name="Pause").press("Enter")
    page.get_by_text("paused", exact=True).wait_for(timeout=SOON)
    server.post("/v1/completions", model="sql", prompt=PROMPT, max_tokens=4)
    page.wait_for_timeout(2500)
    assert row(page, "outcomes", "length").inner_text().split() == ["length", "3"]
    page.get_by_role("button", name="Resume").press("Enter")
    shows(page, "outcomes", "length", "4")


def test_texts_of_others_stay_texts(page, world, server):
    world.gate.clear()
    waiting = [
        server.open(model="sql", prompt=PROMPT, max_tokens=2, user=f"user {EVIL}", stream=True)
        for _ in range(3)
    ]
    sign_in(page)
    page.locator("#users").get_by_text(f"user {EVIL}", exact=True).wait_for(timeout=SOON)
    assert row(page, "users", f"user {EVIL}").locator("td").inner_text() == "3"
    told = row(page, "adapters", "sql@v2").inner_text()
    assert f"ann {EVIL}" in told and f"note {EVIL}" in told
    assert (page.locator("img").count(), page.locator("script").count()) == (0, 1), (
        "the script is the page's own"
    )
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
    )
    assert page.title() == "labkit server", "the policy lets a script run that is not the page's"
    world.gate.set()
    for connection in waiting:
        connection.close()
    page.get_by_text("no requests", exact=True).wait_for(timeout=SOON)


@pytest.mark.parametrize("width", [320, 700, 1600])
def test_it_fits_narrow_and_wide_light_and_dark(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    sign_in(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shades = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(
            "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
        )
        shades.append([sum(map(int, color[4:-1].split(","))) for color in colors])
    (light, light_text), (dark, dark_text) = shades
    assert light - light_text > 400 and dark_text - dark > 400


def test_a_server_that_does_not_answer_is_said_and_the_page_goes_on_when_it_does(page):
    sign_in(page)
    page.route("**/v1/state", lambda route: route.abort())
    page.get_by_text("no connection", exact=False).wait_for(timeout=SOON)
    page.unroute("**/v1/state")
    page.get_by_text("serving", exact=True).wait_for(timeout=SOON)


def test_an_answer_that_never_comes_is_not_waited_for(page):
    sign_in(page)
    page.route("**/v1/state", lambda route: None)
    page.get_by_text("no connection", exact=False).wait_for(timeout=SOON)
    page.unroute("**/v1/state")
    page.get_by_text("serving", exact=True).wait_for(timeout=SOON)
