"""The text of an answer while its tokens come: whole letters, and nothing from a stop word on.

A letter may be several tokens, and half of one decodes to "�": it waits for the rest. Text that may be the beginning
of a stop word waits too, so that nobody is sent a part of it.
"""

import threading
from collections.abc import Callable, Sequence

from labkit.serving.requests import Completion, NewToken, Stream

BROKEN = "�"


class TextWriter:
    """Turns tokens into pieces of text, and ends the answer at a stop word.

    It is the listener of a `Stream`, called in the engine's thread, so that no token is written after a stop word.

    Args:
        decode: token ids to text.
        stops: words that end the answer; they are not part of it.
        send: called with each piece of text, and with the completion at the end.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[str],
        send: Callable[[str | Completion], None],
    ):
        self.decode, self.stops, self.send = decode, tuple(stops), send
        self.ids: list[int] = []
        self.before, self.read = (
            0,
            0,
        )  # the tokens between them give the next ones their context, such as a space
        self.held = ""
        self.stopped = False
        self.stream: Stream | None = None
        self.lock = threading.Lock()

    def attach(self, stream: Stream) -> None:
        """The stream that is to be ended at a stop word, known only once it is submitted."""
        with self.lock:
            self.stream = stream
            if self.stopped:
                stream.stop()

    def __call__(self, event: NewToken | Completion) -> None:
        if isinstance(event, Completion):
            if not self.stopped:
                self.held += self.decode(self.ids[self.before :])[len(self.context()) :]
                self.emit(is_last=True)
            self.send(event)
        elif not self.stopped:
            self.ids.append(event.id)
            text, known = self.decode(self.ids[self.before :]), self.context()
            if len(text) > len(known) and not text.endswith(BROKEN):
                self.held += text[len(known) :]
                self.before, self.read = self.read, len(self.ids)
                self.emit()

    def context(self) -> str:
        return self.decode(self.ids[self.before : self.read])

    def emit(self, is_last: bool = False) -> None:
        """Send what is held, up to a stop word, or to what may become one."""
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            ready, self.held = self.held[: min(places)], ""
            with self.lock:
                self.stopped = True
                if self.stream is not None:
                    self.stream.stop()
        else:
            waiting = 0 if is_last else max((overlap(self.held, stop) for stop in self.stops), default=0)
            cut = len(self.held) - waiting
            ready, self.held = self.held[:cut], self.held[cut:]
        if ready:
            self.send(ready)


def overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` are the beginning of `stop`.

    >>> overlap("one END", "END OF"), overlap("one E", "END"), overlap("one", "END")
    (3, 1, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
