"""Streams and events of a simulated GPU: queues of operations, and points in them that others wait for.

An operation runs at the latest when something forces it: the host reads a number, or synchronizes, or an operation
that waits for it is forced itself. It runs at the earliest at once, if nothing that its stream waits for is
outstanding. How eager each stream is, a `Schedule` says.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Schedule(NamedTuple):
    """The probability with which an operation that may run does run, each time something else is queued."""

    computing: float
    copying: float


SCHEDULES = {
    "copies late": Schedule(1, 0),
    "copies early": Schedule(0, 1),
    "all late": Schedule(0, 0),
    "at random": Schedule(0.4, 0.4),
}


class Point(NamedTuple):
    """After the first `n` operations of a stream."""

    stream: "Stream"
    n: int

    def is_past(self) -> bool:
        return self.stream.done >= self.n


@dataclass(eq=False)
class Stream:
    """A queue of operations; a `Point` in it, of another stream, has to be past before the next one runs.

    Attributes:
        scheduler: is told after each operation that was queued.
        eagerness: the probability of `Schedule`.
    """

    scheduler: "Scheduler"
    eagerness: float
    queue: list[Callable[[], Any] | Point] = field(default_factory=list)
    done: int = 0

    def push(self, operation: Callable[[], Any] | Point) -> None:
        self.queue.append(operation)
        self.scheduler.run_some()

    def now(self) -> Point:
        return Point(self, len(self.queue))

    def may_run(self) -> bool:
        if self.done == len(self.queue):
            return False
        following = self.queue[self.done]
        return not isinstance(following, Point) or following.is_past()

    def run_one(self) -> None:
        operation = self.queue[self.done]
        self.queue[self.done] = Point(self, 0)  # what it refers to may go
        if isinstance(operation, Point):
            operation.stream.run_until(operation.n)
        else:
            operation()
        self.done += 1

    def run_until(self, n: int) -> None:
        while self.done < n:
            self.run_one()

    # what torch.cuda.Stream has

    def wait_event(self, event: "Event") -> None:
        if event.point is not None:  # one that was never recorded is no reason to wait
            self.push(event.point)

    def wait_stream(self, other: "Stream") -> None:
        self.push(other.now())

    def synchronize(self) -> None:
        self.run_until(len(self.queue))


class Event:
    """What torch.cuda.Event is."""

    point: Point | None = None

    def record(self, stream: Stream) -> None:
        self.point = stream.now()


class Scheduler:
    """Runs what may run, in any order that the streams allow."""

    def __init__(self, schedule: Schedule, seed: int):
        self.schedule, self.random = schedule, random.Random(seed)
        self.streams: list[Stream] = []

    def stream(self, computing: bool = False) -> Stream:
        stream = Stream(self, self.schedule.computing if computing else self.schedule.copying)
        self.streams.append(stream)
        return stream

    def run_some(self) -> None:
        while ready := [s for s in self.streams if s.may_run() and self.random.random() < s.eagerness]:
            self.random.choice(ready).run_one()

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()
