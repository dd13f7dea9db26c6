"""The training panel without a browser: the run in the background, its figure, and who may train when."""

import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from IPython.display import HTML, Image
from matplotlib import pyplot as plt

from labkit.lab.explore import background
from labkit.lab.explore import training as explore
from labkit.lab.figures.training import run_figure
from labkit.lora.inject import lora_layers
from labkit.training.config import TrainConfig
from labkit.training.control import TrainControl
from labkit.training.history import History
from labkit.training.loop import train
from tests.lab import explorers
from tests.training.small_runs import QUIET, SHORT, tiny_adapted, weights

CONFIG = TrainConfig(**QUIET, eval_every=3)


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A run that a test left behind is ended."""
    yield
    if background.running() is not None:
        background.running().stop()


@pytest.fixture
def recorded(tiny):
    """A run with its spectra."""
    spectra = background.UpdateSpectra(model := tiny_adapted())
    return train(model, tiny[1], SHORT, CONFIG, SHORT[:2], control=TrainControl(spectra)), spectra.by_step


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes a fraction of a second, and most tests look at something else."""
    monkeypatch.setattr(explore, "png", lambda figure: b"")


def panel_of(tiny, monkeypatch=None, **more):
    """A panel; with `monkeypatch`, one with its widgets."""
    panel = explore.TrainingPanel(tiny_adapted(), tiny[1], SHORT, CONFIG, SHORT[:2], **more)
    if monkeypatch is not None:
        monkeypatch.setattr(explore, "display", lambda _: None)
        panel.show()
    return panel


def wait_until_it_stands(panel):
    """A paused run stands before its first step too, which its thread may not have come to yet."""
    for _ in range(1000):
        if panel.run.control.state == "paused":
            return
        time.sleep(0.02)
    raise AssertionError(f"the run is {panel.run.control.state}, and was to stand")


def test_headless_the_recorded_run_is_drawn_and_nothing_is_trained(tiny, recorded):
    model, panels = tiny_adapted(), []
    before, (history, spectra) = weights(model), recorded
    given = {"recorded": history, "spectra": spectra}
    shown = explorers.shown(
        explore, lambda: panels.append(explore.training_panel(model, tiny[1], SHORT, CONFIG, **given))
    )
    line, picture = shown
    assert isinstance(line, HTML) and isinstance(picture, Image)
    assert "recorded run" in line.data and "step 6 of 6" in line.data and "held-out" in line.data
    assert panels[0].history is history and panels[0].wait() is history
    assert torch.equal(weights(model), before)


def test_headless_without_a_recorded_run_it_says_where_to_go(tiny):
    (note,) = explorers.shown(explore, lambda: explore.training_panel(tiny_adapted(), tiny[1], SHORT, CONFIG))
    assert "run this cell in JupyterLab" in note.data


def test_a_run_in_the_background_is_the_run_of_train_bit_for_bit(tiny, recorded):
    panel = panel_of(tiny)
    assert panel.history is None
    panel.run.start()
    history = panel.wait()
    assert history.losses == recorded[0].losses and history.evals == recorded[0].evals
    assert panel.spectra == recorded[1]


def test_the_spectrum_is_that_of_the_product(tiny, recorded):
    panel = panel_of(tiny)
    panel.run.start()
    panel.wait()
    layer = lora_layers(panel.run.model)[panel.run.spectra.layer]
    values = torch.tensor(panel.spectra[6])
    torch.testing.assert_close(values, torch.linalg.svdvals(layer.delta().detach())[:2], rtol=1e-4, atol=1e-6)
    assert sorted(panel.spectra) == [1, 2, 3, 4, 5, 6] and values[0] > 0


def test_a_layer_without_factors_is_named_and_dora_has_none(tiny):
    with pytest.raises(
        ValueError, match=r"layer='model.layers.1.self_attn.q_porj' is no layer .*did you mean"
    ):
        background.UpdateSpectra(tiny_adapted(), "model.layers.1.self_attn.q_porj")
    spectra = background.UpdateSpectra(tiny_adapted(variant="dora"))
    assert spectra.layer == "" and spectra.now() == []


def test_an_error_in_the_thread_is_shown_and_raised(tiny):
    panel = explore.TrainingPanel(tiny_adapted(), tiny[1], [{"prompt": "<b>x</b>"}], CONFIG)
    panel.run.start()
    with pytest.raises(ValueError, match="record 0: a record needs"):
        panel.wait()
    assert "Failed" in panel.sentence() and "record 0: a record needs" in panel.sentence()
    assert "<b>x" not in panel.sentence() and background.running() is None


def test_a_second_run_is_refused_until_the_first_is_stopped(tiny, monkeypatch, undrawn):
    first, second = panel_of(tiny, monkeypatch), panel_of(tiny, monkeypatch)
    first.pause_or_resume()
    first.start()
    wait_until_it_stands(first)
    second.start()
    assert second.run.thread is None and not second.buttons["start"].disabled
    assert "another run is going on (0 of 6 steps); stop it first" in second.status.value
    second.stop()
    first.wait()
    assert first.history.stopped == "interrupted" and first.history.steps == []
    second.start()
    assert len(second.wait().steps) == 6
    with pytest.raises(RuntimeError, match="was started before"):
        second.run.start()


def test_running_the_cell_again_stops_its_run_and_another_cell_does_not(tiny, monkeypatch, undrawn):
    monkeypatch.setattr(explore, "is_interactive", lambda: True)
    monkeypatch.setattr(explore, "display", lambda _: None)
    at = {"cell": "a"}
    for module in (explore, background):
        monkeypatch.setattr(module, "this_cell", lambda: at["cell"])
    panels = []

    def run_cell(cell):
        at["cell"] = cell
        panels.append(explore.training_panel(tiny_adapted(), tiny[1], SHORT, CONFIG, SHORT[:2]))

    run_cell("a")
    panels[0].pause_or_resume()
    panels[0].start()
    run_cell("b")
    assert panels[0].run.is_on
    run_cell("a")
    assert panels[0].run.is_over and panels[0].history.stopped == "interrupted"
    panels[-1].start()
    assert len(panels[-1].wait().steps) == 6


def test_the_widgets_follow_the_run(tiny, monkeypatch, recorded):
    panel = panel_of(tiny, monkeypatch, recorded=recorded[0])
    buttons, empty = panel.buttons, panel.picture.value

    def disabled():
        return [one.disabled for one in buttons.values()]

    assert disabled() == [False, True, True] and "6 steps on 8 records" in panel.status.value
    panel.pause_or_resume()
    buttons["start"].click()
    wait_until_it_stands(panel)
    assert disabled() == [True, False, False] and buttons["pause"].description == "Resume"
    slider = panel.widget.children[0].children[-1]
    slider.value = 0.5
    buttons["pause"].click()
    history = panel.wait()
    assert disabled() == [True, True, True] and buttons["pause"].description == "Pause"
    assert [row["lr"] for row in history.steps] == [0.5 * row["lr"] for row in recorded[0].steps]
    assert "<b>finished</b> · step 6 of 6" in panel.status.value and "tokens/s" in panel.status.value
    assert "GB in this process" in panel.status.value and panel.picture.value != empty
    assert panel.moves == [(0, 0.5)]


def test_a_panel_that_nobody_sees_any_more_stops_and_keeps_what_there_is(tiny, monkeypatch, undrawn):
    panel = panel_of(tiny, monkeypatch)
    panel.pause_or_resume()
    panel.start()
    panel.widget._view_count = 1
    panel.widget._view_count = 2
    panel.widget._view_count = 1
    assert panel.run.is_on
    panel.widget._view_count = 0
    assert panel.wait().stopped == "interrupted"


def test_it_is_drawn_once_a_second_at_most_and_in_a_fifth_of_the_time(tiny, monkeypatch, undrawn):
    panel, clock, drawn = panel_of(tiny, monkeypatch), [100.0], []

    def draw(*_):
        clock[0] += 0.5  # it takes half a second
        drawn.append(clock[0])

    monkeypatch.setattr(explore, "run_figure", draw)
    monkeypatch.setattr(explore, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    panel.next_drawing = panel.next_line = 0.0
    for _ in range(100):
        panel.refresh()
        clock[0] += 0.1
    assert len(drawn) == 5 and min(b - a for a, b in pairwise(drawn)) >= 2.5


def test_the_figure_of_a_run_is_drawn_without_pyplot_and_without_mathematical_text(recorded):
    """Both have state that the notebook's own thread may be changing."""
    history, spectra = recorded
    before, figures = plt.get_fignums(), []
    names = {"layer": "layer 1, v", "recorded": history, "moves": [(2, 0.5)]}
    thread = threading.Thread(target=lambda: figures.append(run_figure(history, 12, spectra, **names)))
    thread.start()
    thread.join()
    (figure,) = figures
    explore.png(figure)
    loss, values = figure.axes
    assert plt.get_fignums() == before
    texts = [text.get_text() for axes in figure.axes for text in axes.findobj(type(loss.title))]
    assert not any("$" in text for text in texts) and any("lr × 0.5" in text for text in texts)
    assert loss.get_xlim()[1] == 12.5 and explorers.title(figure, 1) == "ΔW of layer 1, v"
    last = max(values.lines, key=lambda line: line.get_linewidth())
    assert list(last.get_ydata()) == spectra[6]


@pytest.mark.parametrize("history", [None, History()])
def test_there_is_a_figure_before_the_first_step(history):
    figure = run_figure(history, 12)
    explore.png(figure)
    assert figure.axes[0].get_xlim() == (0, 12.5)
    assert any("no update yet" in text.get_text() for text in figure.axes[1].texts)
