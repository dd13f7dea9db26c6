"""A real JupyterLab in a real browser: a control moves, and its figure is redrawn."""

import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import nbformat
import pytest
from nbformat import v4

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
CELLS = [
    "from labkit import lab\nquestion = lab.predict('Which is larger?', ['one', 'two'])",
    "lab.explore.weight_memory()",
    "question.reveal('two', 'Because two is more than one.')",
]

WEIGHTS = """
import torch
from labkit import lab
weights = {"layers.0.q_proj": torch.randn(96, 96), "layers.1.up_proj": torch.randn(128, 96)}
"""
EXPLORERS = {  # and how many controls each has
    "lab.explore.codebook_explorer(weights)": 4,
    "lab.explore.constants_explorer(weights)": 4,
    "lab.explore.paging_explorer(weights)": 3,
    "lab.explore.variant_explorer(weights, {n: w.sign() for n, w in weights.items()})": 4,
    "lab.explore.cost_explorer(['llama-2-7b', 'tiny-llama'])": 3,
}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium here: the explorers were NOT tried in a browser (apt install chromium)",
)


def write_notebook(path, sources):
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [v4.new_code_cell(source) for source in sources]
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)


@pytest.fixture(scope="module")
def lab_url(tmp_path_factory):
    """JupyterLab on a free port of localhost, with two notebooks; `{0}` in the address is for a name."""
    folder = tmp_path_factory.mktemp("lab")
    write_notebook(folder / "first.ipynb", CELLS)
    write_notebook(folder / "explorers.ipynb", [WEIGHTS, *EXPLORERS])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "LABKIT_STATIC"}
    environment["JUPYTER_CONFIG_DIR"] = str(folder / ".config")
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=sesame", "--no-browser", "--allow-root"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urlopen(f"http://127.0.0.1:{port}/api?token=sesame", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token=sesame"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def run_all_cells(browser, url):
    """The page of the notebook at `url`, as soon as its cells have been sent to the kernel."""
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.goto(url)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
    page.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    return page


def wait_for_another_figure(page, cell, before):
    """Wait until the figure in the output of that cell is no longer `before`."""
    page.wait_for_function(
        "([cell, before]) => { const code = document.querySelectorAll('.jp-CodeCell')[cell];"
        " const image = code.querySelector('.jp-OutputArea img'); return image && image.src !== before }",
        arg=[cell, before],
        timeout=20_000,
    )


@pytest.mark.slow
def test_slider_redraws_the_figure_and_a_prediction_is_remembered(browser, lab_url):
    page = run_all_cells(browser, lab_url.format("first"))
    figure = page.locator(".jp-OutputArea img").first
    figure.wait_for(timeout=120_000)
    before = figure.get_attribute("src")

    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("13B", exact=True).first.wait_for(timeout=20_000)
    wait_for_another_figure(page, 1, before)

    page.get_by_text("You made no prediction", exact=False).wait_for(timeout=20_000)
    page.locator("label:has-text('one') input[type=radio]").first.check()
    last = page.locator(".jp-CodeCell").nth(2)
    last.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    page.get_by_text("You said: one.", exact=False).wait_for(timeout=20_000)
    page.close()


@pytest.mark.slow
def test_every_control_of_the_explorers_redraws_the_figure(browser, lab_url):
    page = run_all_cells(browser, lab_url.format("explorers"))
    for number, controls in enumerate(EXPLORERS.values(), 1):
        cell = page.locator(".jp-CodeCell").nth(number)
        figure = cell.locator(".jp-OutputArea img").first
        figure.wait_for(timeout=120_000)
        sliders, lists = cell.locator(".noUi-handle"), cell.locator("select")
        assert sliders.count() + lists.count() == controls
        for slider in sliders.all():
            before = figure.get_attribute("src")
            slider.focus()
            page.keyboard.press("ArrowRight")
            wait_for_another_figure(page, number, before)
        for choice in lists.all():
            before = figure.get_attribute("src")
            chosen = choice.evaluate("list => list.selectedIndex")
            choice.select_option(index=0 if chosen else 1)
            wait_for_another_figure(page, number, before)
    page.close()
