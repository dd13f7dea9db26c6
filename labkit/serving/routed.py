"""An answer between its request and its score: which version writes it, why, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from labkit.serving.requests import CANCELLED, ERROR, TIMEOUT, Completion, Stream
from labkit.serving.trial import CONTROL

WORST = (ERROR, TIMEOUT, CANCELLED)  # of several ends of one answer, the first of these counts


class UnknownAnswer(LookupError):
    """There is no answer of that id, or it was given too long ago."""


class AlreadyScored(RuntimeError):
    """The answer has a score, and keeps it."""


@dataclass(eq=False)
class Routed:
    """An answer.

    Attributes:
        id: that the client gets.
        label: the version that writes what is sent.
        record: the `TrialRecord` of the trial that it is a part of, if it is.
        arm: whose it is.
        person: stands for the user.
        why: this version.
        shadow: the version that answers too, unseen; None for none.
        prompt: what is asked, for a judge; None where none judges.
        is_scored: is there a score? There is never a second one.
        found: the scores of both arms of a shadow trial, as they come.
        stream: of the shadow.
        running: answers that have not ended, with the shadow's.
    """

    id: str
    label: str
    record: Any = None
    arm: str = CONTROL
    person: str = ""
    why: str = ""
    shadow: str | None = None
    prompt: str | None = None
    is_scored: bool = False
    found: dict[str, float | None] = field(default_factory=dict)
    stream: Stream | None = None
    running: int = 1

    def let_go(self) -> None:
        """Take note that one of its answers has ended; after the last one, keep only what a score needs."""
        self.running -= 1
        if self.running == 0:
            self.prompt = self.stream = None


class Gathering:
    """The texts and ends of `number` answers, handed on when all have ended. A listener in the engine's thread.

    Args:
        number: of answers.
        done: called with their texts and completions.
    """

    def __init__(self, number: int, done: Callable[[list[str], list[Completion]], None]):
        self.texts, self.ends, self.number, self.done = [""] * number, dict[int, Completion](), number, done

    def __call__(self, index: int, event: str | Completion) -> None:
        if isinstance(event, str):
            self.texts[index] += event
            return
        self.ends[index] = event
        if len(self.ends) == self.number:
            self.done(self.texts, [self.ends[n] for n in range(self.number)])


def outcome_of(ends: list[Completion]) -> str:
    """How an answer ended: the worst end of its parts."""
    reasons = [end.finish_reason for end in ends]
    return next((worst for worst in WORST if worst in reasons), reasons[0])
