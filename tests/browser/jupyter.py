"""A JupyterLab to try things in, and a page of it with a notebook."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
from nbformat import v4

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PATIENCE = 500  # times half a second: on a busy machine a server takes minutes to start
NO_BROWSER = "no chromium here: the explorers were NOT tried in a browser (apt install chromium)"


class Lab:
    """A JupyterLab that runs in `folder`."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port

    def notebook(self, name: str, sources: list[str]) -> str:
        """The address of a new notebook with these cells."""
        spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [v4.new_code_cell(source) for source in sources]
        path = self.folder / f"{name}.ipynb"
        nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{name}/tree/{name}.ipynb?token=sesame"


@contextmanager
def running_lab(folder: Path) -> Iterator[Lab]:
    """JupyterLab on a free port of localhost, for as long as the block."""
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
        wait_for(server, f"http://127.0.0.1:{port}/api?token=sesame")
        yield Lab(folder, port)
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(server: subprocess.Popen, address: str) -> None:
    """Wait until the server answers at that address."""
    for _ in range(PATIENCE):
        assert server.poll() is None, "JupyterLab ended before it answered"
        try:
            urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"JupyterLab does not answer at {address}")


def open_notebook(browser, url: str):
    """The page of the notebook at `url`, when its kernel is there."""
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.goto(url)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=180_000)
    page.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for(timeout=180_000)
    return page


def choose(page, menu: str, entry: str) -> None:
    """Choose an entry of a menu."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=entry, exact=True).click()


def run_all_cells(browser, url: str):
    """The page of the notebook at `url`, as soon as its cells have been sent to the kernel."""
    page = open_notebook(browser, url)
    choose(page, "Run", "Run All Cells")
    return page


PROMPT = "document.querySelectorAll('.jp-CodeCell')[number].querySelector('.jp-InputPrompt').innerText"


def run_cell(page, number: int):
    """Run one cell; returns it. A page that is not done loading may pass over the keys: then they are pressed again."""
    cell, before = page.locator(".jp-CodeCell").nth(number), page.evaluate(f"number => {PROMPT}", number)
    from playwright.sync_api import TimeoutError as TooLong

    for _ in range(6):
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        try:
            page.wait_for_function(
                f"([number, before]) => {PROMPT} !== before", arg=[number, before], timeout=15_000
            )
            return cell
        except TooLong:
            continue
    raise AssertionError(f"cell {number} was never sent to the kernel")


def read_cell(page, number: int) -> str:
    """Run one cell, and return what it printed when it was done."""
    before = page.evaluate(f"number => {PROMPT}", number)
    cell = run_cell(page, number)
    page.wait_for_function(
        f"([number, before]) => {{ const now = {PROMPT}; return now !== before && /\\d/.test(now) }}",
        arg=[number, before],
        timeout=60_000,
    )
    return cell.locator(".jp-OutputArea").inner_text()
