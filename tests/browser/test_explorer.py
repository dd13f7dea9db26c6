"""A real JupyterLab in a real browser: a control moves, and its figure is redrawn."""

import pytest

from tests.browser.jupyter import CHROMIUM, NO_BROWSER, run_all_cells

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
    "lab.explore.constants_explorer(weights)": 5,
    "lab.explore.paging_explorer(weights)": 3,
    "lab.explore.variant_explorer(weights, {n: w.sign() for n, w in weights.items()})": 4,
    "lab.explore.cost_explorer(['llama-2-7b', 'tiny-llama'])": 3,
}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)


def wait_for_another_figure(page, cell, before):
    """Wait until the figure in the output of that cell is no longer `before`."""
    page.wait_for_function(
        "([cell, before]) => { const code = document.querySelectorAll('.jp-CodeCell')[cell];"
        " const image = code.querySelector('.jp-OutputArea img'); return image && image.src !== before }",
        arg=[cell, before],
        timeout=20_000,
    )


@pytest.mark.slow
def test_slider_redraws_the_figure_and_a_prediction_is_remembered(browser, jupyter):
    page = run_all_cells(browser, jupyter.notebook("first", CELLS))
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
def test_every_control_of_the_explorers_redraws_the_figure(browser, jupyter):
    page = run_all_cells(browser, jupyter.notebook("explorers", [WEIGHTS, *EXPLORERS]))
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
