"""Several processes that compute together, started from one, watched, and ended together.

A rank is a process with a number. Ranks wait for one another in every collective, so whatever happens to one
happens to all: one dies and the others wait, one is slow and all are. The process that started them does not
wait with them. It hears from each where it is (`world.at`), and when one fails, or nothing has moved for
`patience` seconds, it asks each what it is doing, says in one sentence which rank and where, and ends the rest. What a rank returns comes back
through a pipe, only when all are done.

`torchrun` starts ranks the same way and hears only exit codes; `world.joined` works under it too.

Sources: `torch.distributed.elastic.multiprocessing`, `torch.multiprocessing.spawn`.
"""

import multiprocessing
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import TCPStore

from labkit.checks import check_positive, check_whole
from labkit.scale import world

HOST = "127.0.0.1"
STARTUP = 120.0  # seconds for all to be up: they import PyTorch first, on a machine that may be busy
GRACE = 3.0  # seconds for the other ranks to say what they saw, once one has failed
# a server process imports once and forks each rank in milliseconds, before torch has any thread
# what ranks would import themselves, each for 5 s
PRELOAD = ("labkit.scale.world", "transformers.models.llama.modeling_llama", "numba")
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class RankFailed(RuntimeError):
    """A rank failed, died or stood still; the message says which one and where.

    Attributes:
        rank: the one that it began with.
        reports: what each rank said, by rank.
    """

    def __init__(self, message: str, rank: int, reports: dict[int, str] | None = None):
        super().__init__(message)
        self.rank, self.reports = rank, reports or {}


@dataclass
class Rank:
    """A process, and what is known of it.

    Attributes:
        number: its rank.
        process, connection: it, and what it reports through.
        step: where it said that it was last; None before it said anything.
        moved: when that was, on `time.monotonic`.
        outcome: how it ended, ("done", value), ("failed", text), ("waited", text) or ("died", text).
        is_up: has it said that it has begun?
        doing: what it said when asked: does it wait for others, and where is it?
    """

    number: int
    process: BaseProcess
    connection: Connection
    step: int | None = None
    moved: float = field(default_factory=time.monotonic)
    outcome: tuple[str, Any] | None = None
    is_up: bool = False
    doing: tuple[bool, str] | None = None

    @property
    def where(self) -> str:
        return "before its first step" if self.step is None else f"in step {self.step}"


def start(
    function: Callable,
    ranks: int,
    *arguments: Any,
    patience: float = 60.0,
    port: int = 0,
    counted: bool = False,
) -> list[Any]:
    """Run `function(*arguments)` on `ranks` processes that can talk to one another.

    Args:
        function: of a module that can be imported (a process of its own does not see a notebook's cells).
        ranks: how many processes.
        arguments: the same for all; `torch.distributed.get_rank()` says which process it is.
        patience: seconds in which some rank must report (`world.at`) or return. A collective times out after twice that.
        port: on which they find one another; 0 takes a free one.
        counted: count every byte between them (`labkit.scale.counting`).

    Returns:
        What each returned, in order of rank; it is pickled on its way, between processes of one program.

    Raises:
        RankFailed: a rank failed, died, or kept the others waiting for `patience` seconds. All have ended then.
        ValueError: a setting is out of range, the port is taken, or the function cannot be imported elsewhere.
    """
    check_whole("ranks", ranks, usual="one per GPU, or 2 to try it on a CPU")
    check_positive("patience", patience)
    check_importable(function)
    store = listen(port, patience)
    running: list[Rank] = []
    try:
        for number in range(ranks):
            running.append(start_one(number, ranks, store.port, patience, counted, function, arguments))
        return watch(running, patience)
    finally:
        for rank in running:
            rank.process.kill()
            rank.process.join()
            rank.connection.close()


def check_importable(function: Callable) -> None:
    """Raise a `ValueError` if other processes could not find `function`."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError):
        module = None
    if module is None or not getattr(module, "__file__", None):
        name = getattr(function, "__name__", function)
        raise ValueError(
            f"{name} is defined where another process cannot import it (a notebook's cell, or inside a function); "
            "put it at the top level of a file"
        )


def listen(port: int, patience: float) -> TCPStore:
    """The place where the ranks find one another, in this process.

    Raises:
        ValueError: the port is taken, or is none.
    """
    check_whole("port", port, at_least=0, usual="0 takes a free one")
    try:
        return TCPStore(HOST, port, is_master=True, wait_for_workers=False, timeout=world.seconds(patience))
    except (RuntimeError, ValueError, TypeError) as error:  # torch's DistNetworkError among them
        reason = "is taken by another program" if "EADDRINUSE" in str(error) else "cannot be listened on"
        raise ValueError(f"port={port} {reason}; give port=0, which takes a free one") from None


def start_one(
    number: int,
    ranks: int,
    port: int,
    patience: float,
    counted: bool,
    function: Callable,
    arguments: Sequence,
) -> Rank:
    """One process, started."""
    context: Any = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload([*PRELOAD, function.__module__])  # heeded by the first call
    ours, its = context.Pipe()
    # twice the patience: a rank that waits should be asked what for, before it gives up
    place = world.Place(number, ranks, HOST, port, 2 * patience, counted)
    process = context.Process(target=world.take_part, args=(place, its, function, arguments), daemon=True)
    process.start()
    its.close()
    return Rank(number, process, ours)


def watch(running: list[Rank], patience: float) -> list[Any]:
    """Wait until all have returned, and give what they did.

    Raises:
        RankFailed: see `start`.
    """
    while any(rank.outcome is None for rank in running):
        hear(running, patience)
        failed = [rank for rank in running if rank.outcome and rank.outcome[0] != "done"]
        if failed:
            until = time.monotonic() + GRACE  # a rank that lost its neighbour reports too, often first
            while time.monotonic() < until and any(rank.outcome is None for rank in running):
                hear(running, until - time.monotonic())
            raise failure(running)
        allowed = patience if all(rank.is_up for rank in running) else max(patience, STARTUP)
        if time.monotonic() - max(rank.moved for rank in running) > allowed:
            raise standstill(running, patience)
    return [rank.outcome[1] for rank in running]


def hear(running: list[Rank], seconds: float) -> None:
    """Take in what the ranks report, waiting at most so long for something."""
    open_ones = [rank for rank in running if rank.outcome is None]
    happened = wait([x for r in open_ones for x in (r.connection, r.process.sentinel)], max(0.0, seconds))
    for rank in open_ones:
        if rank.connection in happened:
            with suppress(EOFError, OSError):
                while rank.outcome is None and rank.connection.poll():
                    kind, value = pickle.loads(rank.connection.recv_bytes())  # of our own process
                    if kind != "where":  # an answer is no step
                        rank.moved = time.monotonic()
                    if kind == "up":
                        rank.is_up = True
                    elif kind == "at":
                        rank.step = value
                    elif kind == "where":
                        rank.doing = value
                    else:
                        rank.outcome = kind, value
        if rank.outcome is None and rank.process.sentinel in happened and not rank.process.is_alive():
            rank.outcome = "died", how_it_ended(rank.process)


def how_it_ended(process: BaseProcess) -> str:
    """The end of a process that said nothing."""
    process.join()
    code = process.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (as the system does when memory is short)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def failure(running: list[Rank]) -> RankFailed:
    """The error about the rank that it began with: one that died, else one with an error of its own."""
    order = {"died": 0, "failed": 1, "waited": 2}
    failed = [rank for rank in running if rank.outcome and rank.outcome[0] in order]
    first = min(failed, key=lambda rank: (order[rank.outcome[0]], rank.number))
    kind, text = first.outcome
    said = (
        f"rank {first.number} of {len(running)} {text}" if kind == "died" else f"rank {first.number}: {text}"
    )
    ended = "; the other ranks were ended, and nothing that they computed is kept"
    reports = {rank.number: str(rank.outcome[1]) for rank in failed}
    return RankFailed(f"{said} ({first.where}){ended if len(running) > 1 else ''}", first.number, reports)


def standstill(running: list[Rank], patience: float) -> RankFailed:
    """The error about ranks of which none has moved for too long: who waits where, and for whom."""
    open_ones = [rank for rank in running if rank.outcome is None]
    for rank in open_ones:
        with suppress(OSError):
            rank.connection.send_bytes(world.WHERE)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(r.doing is None and r.outcome is None for r in open_ones):
        hear(running, until - time.monotonic())
    reports = {rank.number: str(rank.doing[1]) for rank in open_ones if rank.doing}
    waiting = [rank for rank in running if rank.doing and rank.doing[0]]
    behind = [rank for rank in open_ones if rank not in waiting] or open_ones
    first, since = behind[0], time.monotonic() - min(rank.moved for rank in behind)
    if len(waiting) == len(running):
        places = ", ".join(f"rank {rank.number} {rank.doing[1]}" for rank in waiting)
        return RankFailed(
            f"no rank has moved for {patience:g} seconds, and each waits for the others: {places}; they must all call "
            "the same collectives in the same order. All were ended",
            first.number,
            reports,
        )
    names = " and ".join(f"rank {rank.number}" for rank in behind)
    others = f" while rank {waiting[0].number} waits for it {waiting[0].doing[1]}" if waiting else ""
    return RankFailed(
        f"{names} {'have' if len(behind) > 1 else 'has'} been {first.where} for {since:.0f} seconds{f', {first.doing[1]},' if first.doing else ''}{others}: "
        "a straggler, or a hang; all were ended. If it is only slow, give more patience",
        first.number,
        reports,
    )
