"""One JupyterLab and one browser for all tests here."""

import pytest

from tests.browser.jupyter import CHROMIUM, FLAGS, running_lab


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    """A running JupyterLab; see `tests.browser.jupyter.Lab`."""
    with running_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
