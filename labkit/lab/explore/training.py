"""A panel that trains: the run goes on in a thread of its own, and its loss and spectrum grow before your eyes."""

import html
import threading
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from torch import nn

from labkit.lab.explore.background import BackgroundRun, running, this_cell
from labkit.lab.explore.spectra import short_name
from labkit.lab.figures.training import run_figure
from labkit.lab.interactive import is_interactive
from labkit.training.config import TrainConfig
from labkit.training.history import History

EVERY = 1.0  # seconds between two drawings, at least
SHARE = 0.2  # of the time that drawing may take
FACTORS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10)


def training_panel(
    model: nn.Module,
    tokenizer,
    records: Sequence[dict],
    config: TrainConfig | None = None,
    held_out: Sequence[dict] | None = None,
    layer: str | None = None,
    recorded: History | None = None,
    spectra: Mapping[int, Sequence[float]] | None = None,
) -> "TrainingPanel":
    """Train `model` in the background: Start, Pause, Stop, and a factor on the learning rate, between two steps.

    The figure is drawn at most once a second: loss, held-out points, and the singular values of one layer's update.
    Stop keeps what the model has learned, as does deleting the cell; running the cell again stops the run, and shows
    a new panel. Other cells may run meanwhile. What they must not do is use `model` while a step changes it, seed or
    draw from PyTorch's own random generator (dropout uses it), or change default dtype or device. Pause first, or:

        with panel.between_steps():
            labkit.training.generate(model, tokenizer, prompts)

    Headless, nothing is trained, and the recorded run is drawn.

    Args:
        model, tokenizer, records, config, held_out: as for `labkit.train`.
        layer: name of the LoRA layer whose update is shown; default: the one in the middle of the model.
        recorded: a run that was made before with these settings; in a browser, drawn in grey behind the live one.
        spectra: {after which step of `recorded`: singular values}; see `UpdateSpectra`.

    Returns:
        The panel; `wait()` waits for the end of its run and returns the history.

    Raises:
        ValueError: `layer` names no layer with a LoRA update.
    """
    panel = TrainingPanel(model, tokenizer, records, config or TrainConfig(), held_out, layer, recorded)
    if is_interactive():
        other = running()
        if other is not None and other.cell is not None and other.cell == this_cell():
            other.stop()  # this cell was run again
        panel.show()
    elif recorded is None:
        display(
            HTML("<p>The training panel needs a browser: run this cell in JupyterLab, and press Start.</p>")
        )
    else:
        rate = f"{recorded.tokens_per_second:.0f} tokens/s" if recorded.steps else ""
        display(HTML(f"<p><b>recorded run</b> · {numbers(recorded, len(recorded.steps), [rate])}</p>"))
        figure = run_figure(recorded, None, spectra, short_name(panel.run.spectra.layer))
        display(Image(png(figure)))
    return panel


class TrainingPanel:
    """What `training_panel` shows.

    Attributes:
        run: the `BackgroundRun`.
        spectra: {after which step: singular values of the layer's update}.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        records: Sequence[dict],
        config: TrainConfig,
        held_out: Sequence[dict] | None = None,
        layer: str | None = None,
        recorded: History | None = None,
    ):
        self.run = BackgroundRun(model, tokenizer, records, config, held_out, layer, self.refresh)
        self.recorded = recorded
        self.moves: list[tuple[int, float]] = []  # (after which step, the factor from there on)
        self.spectra = self.run.spectra.by_step
        self.widget: Any = None  # until it is shown
        self.said = ""
        self.next_line = self.next_drawing = 0.0  # not before these times
        self.one_at_a_time = threading.RLock()  # the run redraws, and so do the buttons

    @property
    def history(self) -> History | None:
        """What there is of the run so far; before a run, the recorded one."""
        return self.run.history or self.recorded

    def wait(self) -> History | None:
        """Wait until the run is over. Without one, comes back at once. The buttons work meanwhile in JupyterLab.

        Interrupting the kernel ends the waiting, and not the run.

        Returns:
            `history`.

        Raises:
            Exception: what ended the run, if an error did.
        """
        if self.run.thread is not None:
            self.run.thread.join()
        if self.run.error is not None:
            raise self.run.error
        return self.history

    def between_steps(self):
        """A context in which the run stands, so that the model may be used."""
        return self.run.control.between_steps()

    def start(self) -> None:
        """Begin the run; if that is not possible, say why in the panel."""
        try:
            self.run.start()
            self.said = ""
        except RuntimeError as error:
            self.said = str(error)
        self.redraw()

    def pause_or_resume(self) -> None:
        """Let the run stand after the step under way, or go on."""
        if self.run.control.is_pausing:
            self.run.control.resume()
        else:
            self.run.control.pause()
        self.redraw(picture=False)

    def stop(self) -> None:
        """End the run after the step under way; where another one is going on, that one."""
        run = self.run if self.run.is_on else running()
        if run is not None:
            run.control.stop()
        self.said = ""
        self.redraw(picture=False)

    def multiply_rate(self, factor: float) -> None:
        """Multiply the scheduled learning rate, from the next step on."""
        self.run.control.lr_multiplier = factor
        done = len(self.run.history.steps) if self.run.history else 0
        self.moves = [move for move in self.moves if move[0] != done] + [(done, factor)]
        self.redraw()

    def show(self) -> None:
        """Make the widgets and display them."""
        from ipywidgets import HTML as Text
        from ipywidgets import Button, HBox, Layout, SelectionSlider, VBox
        from ipywidgets import Image as Picture

        self.buttons = {
            name: Button(description=name.capitalize(), icon=icon, layout=Layout(width="7em"))
            for name, icon in (("start", "play"), ("pause", "pause"), ("stop", "stop"))
        }
        for name, act in (("start", self.start), ("pause", self.pause_or_resume), ("stop", self.stop)):
            self.buttons[name].on_click(lambda _, act=act: act())
        slider = SelectionSlider(
            options=[(f"× {factor:g}", factor) for factor in FACTORS],
            value=1,
            description="learning rate",
            continuous_update=False,
            layout=Layout(width="22em"),
            style={"description_width": "7em"},
        )
        slider.observe(lambda change: self.multiply_rate(change["new"]), "value")
        self.status = Text()
        self.picture = Picture(format="png", layout=Layout(max_width="100%", width="912px", height="auto"))
        self.widget = VBox([HBox([*self.buttons.values(), slider]), self.status, self.picture])
        self.widget._view_count = 0  # from now on the browser counts its views
        self.widget.observe(self.stop_unseen, "_view_count")
        self.redraw()
        display(self.widget)

    def stop_unseen(self, change: dict) -> None:
        """Stop when the last view of the panel is gone: its cell was deleted, or its output cleared."""
        if change["old"] and not change["new"] and self.run.is_on:
            self.run.control.stop()

    def refresh(self) -> None:
        """Called by the run: show how it is, if that is due."""
        stands = self.run.control.state == "paused" or self.run.is_over
        due = [stands or time.monotonic() >= when for when in (self.next_line, self.next_drawing)]
        if self.widget is not None and any(due):
            self.next_line = time.monotonic() + EVERY
            self.redraw(picture=due[1])

    def redraw(self, picture: bool = True) -> None:
        """Show how it is: buttons, numbers, and the picture, which takes a fraction of a second."""
        with self.one_at_a_time:
            run, control = self.run, self.run.control
            waits = run.is_on and control.is_pausing
            self.buttons["start"].disabled = run.thread is not None
            self.buttons["pause"].disabled = not run.is_on
            self.buttons["pause"].description = "Resume" if waits else "Pause"
            self.buttons["pause"].icon = "play" if waits else "pause"
            self.buttons["stop"].disabled = running() is None
            self.status.value = f"<div style='line-height:1.5'>{self.sentence()}</div>"
            if not picture:
                return
            started = time.monotonic()
            layer, spectra = short_name(run.spectra.layer), dict(self.spectra)
            figure = run_figure(run.history, run.total, spectra, layer, self.recorded, self.moves)
            self.picture.value = png(figure)
            self.next_drawing = started + max(EVERY, (time.monotonic() - started) / SHARE)

    def sentence(self) -> str:
        """How the run is, as HTML."""
        run, control = self.run, self.run.control
        if self.said:
            return f"<b>Not started:</b> {html.escape(self.said)}. Stop ends that one; then press Start."
        if run.thread is None:
            also = ", beside the recorded run in grey" if self.recorded else ""
            return f"Press Start: {run.total} steps on {len(run.records)} records{also}."
        if run.error is not None:
            text = html.escape(f"{type(run.error).__name__}: {run.error}")
            return (
                f"<b style='color:#b00020'>Failed</b> · {text}<br>panel.wait() raises it, with its traceback."
            )
        state = {"running": "training", "ended": "over", "new": "preparing"}.get(control.state, control.state)
        if run.is_over:
            ends = {"interrupted": "stopped: the model keeps what it has learned", "early": "stopped early"}
            state = ends.get(run.history.stopped, run.history.stopped)
        elif control.is_stopping:
            state = "stopping after this step"
        elif control.is_pausing and control.state == "running":
            state = "pausing after this step"
        where = "on the GPU" if next(run.model.parameters()).device.type == "cuda" else "in this process"
        more = [f"{run.tokens_per_second():.0f} tokens/s", f"{run.memory_bytes() / 1e9:.2f} GB {where}"]
        return f"<b>{state}</b> · {numbers(run.history, run.total, more)}"


def numbers(history: History | None, total: int, more: Sequence[str] = ()) -> str:
    """Where a run is, in a line."""
    if history is None or not history.steps:
        return f"0 of {total} steps"
    last = history.steps[-1]
    parts = [f"step {last['step']} of {total}", f"loss {last['loss']:.3f}"]
    if history.evals:
        parts.append(f"held-out {history.evals[-1]['loss']:.3f} after step {history.evals[-1]['step']}")
    parts += [*more, f"learning rate {last['lr']:.2g}"]
    if history.left_out:
        parts.append(f"{len(history.left_out)} records longer than max_length were left out")
    return " · ".join(part for part in parts if part)


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
