"""A request within the engine, and what the engine takes on."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from labkit.checks import check_positive, check_whole
from labkit.serving.kv_cache import Identity
from labkit.serving.requests import Completion, GenerationRequest, NewToken, Stream


@dataclass(frozen=True)
class EngineLimits:
    """What the engine takes on.

    Args:
        rows: requests that are written at once.
        queue: requests that wait.
        context: tokens of a request, prompt and answer; None for the model's own.
        new_tokens: of an answer.
        prompt_tokens: read in one step, so that a long prompt does not hold up the others.
        seconds: that a request may take, from its submission; None for no limit.
        prefix_bytes: of keys and values that are kept for prompts that begin alike; 0 for none.

    Raises:
        ValueError: a limit is out of its range.
    """

    rows: int = 16
    queue: int = 256
    context: int | None = None
    new_tokens: int = 1024
    prompt_tokens: int = 256
    seconds: float | None = None
    prefix_bytes: int = 2**26

    def __post_init__(self):
        for name in ("rows", "queue", "new_tokens", "prompt_tokens"):
            check_whole(name, getattr(self, name))
        check_whole("prefix_bytes", self.prefix_bytes, at_least=0)
        if self.context is not None:
            check_whole("context", self.context, at_least=2)
        if self.seconds is not None:
            check_positive("seconds", self.seconds)


@dataclass(eq=False)
class ServedRow:
    """A request within the engine.

    Attributes:
        stream: its answer goes there.
        path, key: of its adapter, the key for the bank; None for the base.
        queued, deadline: on the engine's clock.
        ids: its tokens, prompt and answer.
        generator: of its draws.
        identity: what computes it; None while it waits.
        read: tokens that have keys and values.
        reused: of those, how many another request had computed.
        written: the answer so far.
        first_token: when it came.
    """

    stream: Stream
    path: Path | None
    key: str | None
    queued: float
    deadline: float
    ids: list[int]
    generator: torch.Generator
    identity: Identity | None = None
    read: int = 0
    reused: int = 0
    written: list[NewToken] = field(default_factory=list)
    first_token: float | None = None

    @classmethod
    def of(cls, stream: Stream, source: Any, now: float, seconds: float | None) -> "ServedRow":
        """A row for a request that comes now, with its adapter's source (None for the base) and the engine's limit."""
        request = stream.request
        limits = [limit for limit in (request.seconds, seconds) if limit is not None]
        return cls(
            stream,
            path=None if source is None else Path(source.path),
            key=None if source is None else f"{source.label} {source.content}",
            queued=now,
            deadline=now + min(limits, default=math.inf),
            ids=list(request.prompt),
            generator=request.sampling.generator(),
        )

    @property
    def request(self) -> GenerationRequest:
        return self.stream.request

    @property
    def use(self) -> tuple[str, float] | None:
        return None if self.key is None else (self.key, self.request.strength)

    def completion(self, reason: str, error: Exception | None, now: float) -> Completion:
        """The answer as it stands."""
        return Completion(
            tuple(self.written),
            reason,
            error,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.reused,
            queued=self.queued,
            first_token=self.first_token,
            finished=now,
        )
