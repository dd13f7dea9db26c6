"""A hand on a run while it goes on: pause, stop, another learning rate, from another thread than the one that trains.

`train` asks its control before each step whether to go on, and nowhere else. So a run stands, or ends, after a
whole number of steps, and the weights are those of its last record. While it stands, the model may be used:

    control = TrainControl()
    Thread(target=train, args=(model, tokenizer, data, config), kwargs={"control": control}).start()
    with control.between_steps():          # waits for the end of the step under way
        generate(model, tokenizer, prompts)

A control on which nothing is called changes no bit of a run.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from labkit.checks import check_number
from labkit.training.history import History

MOST = 1000.0  # times the scheduled rate; more is a slip of the hand
TICK = 0.2  # seconds; where a wait cannot be interrupted (Windows), Ctrl-C gets in between two of them


class TrainControl:
    """Steers one run of `train`. Every method may be called from any thread, at any time.

    Args:
        callback: called with the history so far after each step, after each measurement of the held-out loss, and
            when the run comes to a stand; in the thread that trains, with nothing of a step under way. It must
            not draw from PyTorch's own random generator, which dropout uses. An error in it ends the run as
            `stop` does, and `train` raises it then.
        lr_multiplier: see the attribute.

    Attributes:
        history: of the run, as it grows; None before.
        state: "new", "running", "paused" (it stands between two steps), or "ended".
    """

    def __init__(self, callback: Callable[[History], None] | None = None, lr_multiplier: float = 1.0):
        self.callback, self.lr_multiplier = callback, lr_multiplier
        self.history: History | None = None
        self.state = "new"
        self._changed = threading.Condition()
        self._pausing, self._stopping, self._users = False, False, 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def lr_multiplier(self) -> float:
        """Times the scheduled learning rate, from the next step on; 0 holds the weights still. 0 to 1000.

        It is part of the `lr` in the history. A checkpoint does not keep it: a run that goes on has the one of its
        own control.
        """
        return self._lr_multiplier

    @lr_multiplier.setter
    def lr_multiplier(self, value: float) -> None:
        check_number("lr_multiplier", value, at_least=0, below=MOST, usual="1 is the schedule's own rate")
        self._lr_multiplier = float(value)

    def pause(self) -> None:
        """Let the run stand as soon as the step under way is done; time that it stands is in no step's seconds."""
        with self._changed:
            self._pausing = True

    def resume(self) -> None:
        """Let a paused run go on."""
        with self._changed:
            self._pausing = False
            self._let_go()

    def stop(self) -> None:
        """End the run when the step under way is done, as an interrupt would: paused or not, it keeps what there is.

        `history.stopped` is "interrupted" then; with a checkpoint folder there is a checkpoint, and the next call of
        `train` goes on from it.
        """
        with self._changed:
            self._stopping = True
            self._let_go()

    @property
    def is_pausing(self) -> bool:
        """Has `pause` been called, and not `resume` since? The run may still be in a step."""
        return self._pausing

    @property
    def is_stopping(self) -> bool:
        """Has `stop` been called? The run may still be in a step."""
        return self._stopping

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within the block the run stands between two steps, so that its model may be used.

        Waits for the step under way (and an evaluation after it). Before the run, after it, and in its own callback
        there is nothing to wait for.
        """
        with self._changed:
            self._users += 1
        try:
            with self._changed:
                while self.state == "running" and threading.current_thread() is not self._thread:
                    self._changed.wait(TICK)
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._let_go()

    @contextmanager
    def steers(self, history: History) -> Iterator[None]:
        """For `train`: the block is the run. After it, an error of the callback is raised.

        Raises:
            ValueError: the control has steered another.
        """
        with self._changed:
            if self.state != "new":
                raise ValueError(
                    "this control has steered a run already; make a new TrainControl for each run"
                )
            self.state, self.history, self._thread = "running", history, threading.current_thread()
        try:
            yield
        finally:
            with self._changed:
                self.state = "ended"
                self._changed.notify_all()
        if self._error is not None:
            raise self._error

    def report(self) -> None:
        """For `train`: a step or an evaluation is done, or the run stands."""
        if self.callback is None or self._error is not None:
            return
        try:
            self.callback(self.history)
        except Exception as error:
            self._error = error
            self.stop()

    def go_on(self) -> bool:
        """For `train`: is another step to be taken? Comes back when the run need not stand any more."""
        with self._changed:
            if not self._must_stand():
                return not self._stopping
            self.state = "paused"
            self._changed.notify_all()
        self.report()
        with self._changed:
            while self.state == "paused":
                self._changed.wait(TICK)
        return not self._stopping

    def _let_go(self) -> None:
        """The run goes on if nothing holds it. It is its turn then: who comes next waits for a step."""
        if self.state == "paused" and not self._must_stand():
            self.state = "running"
            self._changed.notify_all()

    def _must_stand(self) -> bool:
        return self._users > 0 or (self._pausing and not self._stopping)
