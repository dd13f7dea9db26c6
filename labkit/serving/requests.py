"""What is asked of the engine, and the stream in which the answer comes.

A request is tokens in, tokens out: texts, chat templates and stop words are the server's. Its stream may be read in
any thread, token by token while it is written, and cancelled at any moment.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from labkit.checks import check_number, check_positive, check_whole
from labkit.serving.sampling import Sampling

STOP, LENGTH, CANCELLED, TIMEOUT, ERROR = FINISHES = ("stop", "length", "cancelled", "timeout", "error")


class Full(RuntimeError):
    """So many requests wait that no further one is taken; try again later."""


class Draining(RuntimeError):
    """No request is taken any more: the engine finishes those that it has, and ends."""


class Source(NamedTuple):
    """Where an adapter is: what messages call it, its PEFT folder, and a hash of what is in it.

    `labkit.serving.versions.Version` has the same three attributes.
    """

    label: str
    path: Path
    content: str


@dataclass(frozen=True)
class GenerationRequest:
    """What to write.

    Args:
        prompt: token ids, at least one.
        adapter: the name of an adapter; None for the base alone.
        strength: the factor of the adapter's correction.
        max_new_tokens: at most.
        sampling: how tokens are chosen; the most likely ones by default.
        stop_ids: tokens that end the text; they are not part of it.
        tenant: for whom; tenants take turns.
        seconds: that it may take from its submission, on the engine's clock; None for the engine's own limit.

    Raises:
        ValueError: a value is out of its range.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    strength: float = 1.0
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    tenant: str = ""
    seconds: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        if not self.prompt:
            raise ValueError("prompt is empty; give the ids of at least one token")
        for token in (*self.prompt, *self.stop_ids):
            check_whole("a token id", token, at_least=0)
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise ValueError(f"adapter={self.adapter!r}: give the name of an adapter, or None for the base")
        check_number("strength", self.strength, at_least=-100, below=100)
        check_whole("max_new_tokens", self.max_new_tokens)
        if not isinstance(self.tenant, str):
            raise ValueError(f"tenant={self.tenant!r}: give a name")
        if self.seconds is not None:
            check_positive("seconds", self.seconds)


class NewToken(NamedTuple):
    """One token of an answer, and its log-probability in the model."""

    id: int
    log_prob: float


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        tokens: what was written, without the token that ended it.
        finish_reason: "stop", "length", "cancelled", "timeout" or "error".
        error: what went wrong, of "error".
        prompt_tokens, cached_tokens: of the prompt, and how many of them had been computed for another request.
        queued, first_token, finished: on the engine's clock: submitted, first token (None without one), finished.
    """

    tokens: tuple[NewToken, ...]
    finish_reason: str
    error: Exception | None
    prompt_tokens: int
    cached_tokens: int
    queued: float
    first_token: float | None
    finished: float

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


Listener = Callable[[NewToken | Completion], None]


class Stream:
    """The answer to one request while it is written: iterate for tokens, or ask for the `result`.

    Args:
        request: that was submitted.
        listener: called in the engine's thread with each token, and with the completion at the end; it must not wait.
    """

    def __init__(self, request: GenerationRequest, listener: Listener | None = None):
        self.request, self.listener = request, listener
        self.events: queue.SimpleQueue[NewToken | Completion] = queue.SimpleQueue()
        self.completion: Completion | None = None
        self.done, self.wanted_end = threading.Event(), ""

    def __iter__(self) -> Iterator[NewToken]:
        """The tokens as they come, to one reader; once they are read, there are none left."""
        while not isinstance(event := self.events.get(), Completion):
            yield event
        self.events.put(event)

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer; waits for it.

        Raises:
            TimeoutError: it is not there after `timeout` seconds.
        """
        if not self.done.wait(timeout):
            raise TimeoutError(f"no answer after {timeout} seconds; the request goes on")
        assert self.completion is not None
        return self.completion

    def cancel(self) -> None:
        """Have the engine drop the request at its next step; what was written stays."""
        self.wanted_end = self.wanted_end or CANCELLED

    def stop(self) -> None:
        """End the answer as a stop token would, as when a stop word shows in its text."""
        self.wanted_end = self.wanted_end or STOP

    def put(self, event: NewToken | Completion) -> None:
        """For the engine: hand over a token or the completion. A listener that fails cancels the request."""
        if isinstance(event, Completion):
            self.completion = event
        self.events.put(event)
        try:
            if self.listener is not None:
                self.listener(event)
        except Exception:
            self.listener = None
            self.cancel()
        if isinstance(event, Completion):
            self.done.set()
