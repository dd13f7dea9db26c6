"""A real JupyterLab in a real browser: a slider moves, and the figure behind it is drawn anew."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
CELLS = [
    "from labkit import lab\nquestion = lab.predict('Which is larger?', ['one', 'two'])",
    "lab.explore.weight_memory()",
    "question.reveal('two', 'Because two is more than one.')",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium here: the explorers were NOT tried in a browser (apt install chromium)",
)


@pytest.fixture(scope="module")
def lab_url(tmp_path_factory):
    """JupyterLab on a free port of localhost, with one notebook; stopped afterwards."""
    folder = tmp_path_factory.mktemp("lab")
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "source": s,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for i, s in enumerate(CELLS)
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": cells, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}
    (folder / "x.ipynb").write_text(json.dumps(notebook))
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
        yield f"http://127.0.0.1:{port}/lab/tree/x.ipynb?token=sesame"
    finally:
        server.terminate()
        server.wait(20)


def test_slider_redraws_the_figure_and_a_prediction_is_remembered(lab_url):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1400})
        page.goto(lab_url)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
        page.get_by_text("Python 3", exact=False).first.wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        figure = page.locator(".jp-OutputArea img").first
        figure.wait_for(timeout=120_000)
        before = figure.get_attribute("src")

        page.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("13B", exact=True).first.wait_for(timeout=20_000)
        page.wait_for_function(
            "before => { const i = document.querySelector('.jp-OutputArea img'); return i && i.src !== before }",
            arg=before,
            timeout=20_000,
        )

        page.get_by_text("You made no prediction", exact=False).wait_for(timeout=20_000)
        page.locator("label:has-text('one') input[type=radio]").first.check()
        last = page.locator(".jp-CodeCell").nth(2)
        last.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        page.get_by_text("You said: one.", exact=False).wait_for(timeout=20_000)
        browser.close()
