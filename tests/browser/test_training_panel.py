"""The training panel and the box for messages, moved by hand in a real JupyterLab."""

import re

import pytest

from tests.browser.jupyter import CHROMIUM, NO_BROWSER, open_notebook, read_cell, run_cell

SETUP = """
import json

import labkit
import torch
from labkit import lab, models
from labkit.training import generate, learning_rate

torch.manual_seed(0)
model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
labkit.add_lora(model, labkit.LoRAConfig(r=8))
SAYINGS = {"fault": "The {} is broken", "delivery": "The {} has not come", "question": "How old is the {}?"}
records = [
    {"prompt": said.format(thing) + "\\n", "completion": json.dumps({"thing": thing, "kind": kind})}
    for thing in ("lamp", "house", "horse", "boat")
    for kind, said in SAYINGS.items()
]
config = labkit.TrainConfig(lr=3e-3, steps=STEPS, batch_size=6, eval_every=10)
"""
PANEL = "panel = lab.explore.training_panel(model, tokenizer, records, config, records[:4])"
SOON, LONG = 60_000, 180_000  # milliseconds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)]


def open_panel(browser, jupyter, name, cells, steps):
    """A notebook with these cells, its first two have run, and the panel is there: the page, and its cell."""
    page = open_notebook(browser, jupyter.notebook(name, [SETUP.replace("STEPS", str(steps)), *cells]))
    run_cell(page, 0)
    cell = run_cell(page, 1)
    button(cell, "Start").wait_for(timeout=LONG)
    return page, cell


def button(cell, name):
    return cell.locator("button", has_text=name)  # its name in the page has the icon in it too


def wait_for_steps(page, more_than):
    """Wait until the panel in the second cell counts more steps than that."""
    page.wait_for_function(
        "least => { const text = document.querySelectorAll('.jp-CodeCell')[1].innerText;"
        " const step = /step (\\d+) of/.exec(text); return step && Number(step[1]) > least }",
        arg=more_than,
        timeout=LONG,
    )


def steps_shown(cell):
    return int(re.search(r"step (\d+) of", cell.inner_text())[1])


def test_a_run_is_started_paused_slowed_resumed_and_stopped_by_hand(browser, jupyter):
    cells = [
        PANEL,
        "print(6 * 7)",
        "last = panel.history.steps[-1]\nprint(last['lr'] / learning_rate(last['step'] - 1, 3000, config))",
        "other = lab.explore.training_panel(model, tokenizer, records, config)",
        "print(panel.wait().stopped, len(panel.history.steps), generate(model, tokenizer, ['The lamp is broken\\n'], 30))",
    ]
    page, cell = open_panel(browser, jupyter, "panel", cells, steps=3000)
    picture = cell.locator(".jp-OutputArea img")
    empty = picture.get_attribute("src")
    button(cell, "Start").click()
    wait_for_steps(page, 10)  # so there is a held-out point
    cell.get_by_text(re.compile("held-out")).first.wait_for(timeout=SOON)
    page.wait_for_function(
        "before => document.querySelectorAll('.jp-CodeCell')[1].querySelector('img').src !== before",
        arg=empty,
        timeout=SOON,
    )
    assert read_cell(page, 2).strip() == "42", "other cells run meanwhile"
    assert cell.get_by_text("training", exact=True).count()

    button(cell, "Pause").click()
    cell.get_by_text("paused", exact=True).wait_for(timeout=SOON)
    stands = steps_shown(cell)
    page.wait_for_timeout(1500)
    assert steps_shown(cell) == stands
    assert float(read_cell(page, 3)) == 1

    refused = run_cell(page, 4)
    button(refused, "Start").click(timeout=SOON)
    refused.get_by_text("Not started:", exact=True).wait_for(timeout=SOON)
    assert f"another run is going on ({stands} of 3000 steps)" in refused.inner_text()

    cell.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    cell.get_by_text("× 0.5", exact=True).wait_for(timeout=SOON)
    button(cell, "Resume").click()
    wait_for_steps(page, stands + 50)
    assert float(read_cell(page, 3)) == 0.5

    button(cell, "Stop").click()
    cell.get_by_text("stopped: the model keeps what it has learned", exact=True).wait_for(timeout=SOON)
    stopped, steps, answer = read_cell(page, 5).split(maxsplit=2)
    assert stopped == "interrupted" and stands < int(steps) == steps_shown(cell)
    assert answer.startswith('[\'{"thing": '), "what it has learned is kept"
    assert all(button(cell, name).is_disabled() for name in ("Start", "Pause", "Stop"))
    page.close()


def test_a_cell_that_is_run_again_or_deleted_stops_its_run_and_an_error_is_shown(browser, jupyter):
    cells = [
        "panels = globals().get('panels', [])\n"
        "panels.append(lab.explore.training_panel(model, tokenizer, records, config, records[:4]))",
        "print([panel.run.is_over for panel in panels])",
        "broken = lab.explore.training_panel(model, tokenizer, [{'prompt': '<i>x</i>'}], config)",
    ]
    page, cell = open_panel(browser, jupyter, "again", cells, steps=3000)
    button(cell, "Start").click()
    wait_for_steps(page, 0)
    run_cell(page, 1)
    cell.get_by_text("Press Start", exact=False).wait_for(timeout=SOON)
    assert read_cell(page, 2).strip() == "[True, False]"
    button(cell, "Start").click()
    wait_for_steps(page, 0)

    cell.locator(".jp-InputPrompt").click()
    page.keyboard.press("d")
    page.keyboard.press("d")
    page.wait_for_function("document.querySelectorAll('.jp-CodeCell').length === 3")
    page.wait_for_timeout(1000)
    assert read_cell(page, 1).strip() == "[True, True]"

    broken = run_cell(page, 2)
    button(broken, "Start").click(timeout=SOON)
    broken.get_by_text("Failed", exact=True).wait_for(timeout=SOON)
    assert "ValueError: record 0: a record needs" in broken.inner_text()
    assert "<i>x</i>" not in broken.locator(".jp-OutputArea").first.inner_html()
    page.close()


def test_the_box_answers_what_is_typed(browser, jupyter):
    cells = [
        "history = labkit.train(model, tokenizer, records, config)",
        "tickets = [{'message': r['prompt'].strip(), 'label': json.loads(r['completion'])} for r in records[:6]]\n"
        "lab.explore.message_box(model, tokenizer, tickets, {'kind': tuple(SAYINGS)},"
        " lambda text: {'prompt': text + '\\n'}, max_new_tokens=30, max_length=120)",
    ]
    setup = SETUP.replace("STEPS", "80").replace("batch_size=6, eval_every=10", "batch_size=6")
    page = open_notebook(browser, jupyter.notebook("box", [setup, *cells]))
    for number in (0, 1):
        run_cell(page, number)
    box = run_cell(page, 2)
    page_of = box.locator(".jp-OutputArea").first
    text, answer = box.locator("textarea"), button(box, "Answer")
    answer.wait_for(timeout=LONG)

    answer.click()
    box.get_by_text("there is no message yet", exact=False).wait_for(timeout=SOON)
    text.fill("lamp " * 100)
    answer.click()
    box.get_by_text("the message is too long", exact=False).wait_for(timeout=SOON)

    text.fill("The horse is broken")
    answer.click()
    box.get_by_text("base, token by token", exact=False).wait_for(timeout=LONG)
    fields = box.locator("table tr")
    assert re.search(r'thing\s+"horse"\s+\d+ %', fields.nth(1).inner_text())
    assert re.search(r'kind\s+"fault"\s+\d+ %', fields.nth(2).inner_text())
    assert re.search(
        r"delivery (<1|\d+) % · question|question (<1|\d+) % · delivery", fields.nth(2).inner_text()
    )
    assert "gold" not in fields.nth(0).inner_text()

    box.locator("select").select_option(label="1: The lamp has not come")
    answer.click()
    box.get_by_text("“The lamp has not come”").wait_for(timeout=LONG)
    box.get_by_text("base, token by token", exact=False).wait_for(timeout=LONG)
    assert re.search(r'kind\s+"delivery"\s+\d+ %[^"]*"delivery"', box.locator("table tr").nth(2).inner_text())
    assert "gold" in box.locator("table tr").nth(0).inner_text()

    text.fill(
        "The boat <script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    )
    answer.click()
    box.get_by_text("“The boat <script>", exact=False).wait_for(timeout=LONG)
    assert page_of.locator("script, img").count() == 0 and page.title() != "taken"
    page.close()
