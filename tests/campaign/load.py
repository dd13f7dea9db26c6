"""Clients that ask a server for completions, all at once, and keep account of every answer.

What each name writes is known before, so that an answer by a wrong adapter shows in its text.
"""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tests.serving.registries import PROMPT
from tests.serving.servers import HEADERS, Running

BUSY = (429, 503)
HUNG_UP, LOST = "hung up", "lost"


@dataclass
class Tally:
    """What became of the requests of all clients.

    Attributes:
        outcomes: how many ended so: a status, "hung up" by the client, or "lost": no whole answer came.
        wrong: answers by another adapter: (name, text).
        seconds: of each answer that came whole.
        tokens: in them.
        lost: what was seen instead of an answer.
    """

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self, wall: float) -> str:
        """Percentiles of latency, and tokens a second of `wall` seconds."""
        p50, p95, p99 = np.percentile(self.seconds, (50, 95, 99))
        ended = ", ".join(f"{outcome}: {count}" for outcome, count in sorted(self.outcomes.items(), key=str))
        return (
            f"{sum(self.outcomes.values())} requests in {wall:.0f} s ({ended}); p50 {p50:.2f} s, p95 {p95:.2f} s, "
            f"p99 {p99:.2f} s; {self.tokens / wall:.0f} tokens/s; {len(self.wrong)} answers by a wrong adapter"
        )


class Client:
    """One client, which asks again as soon as it has its answer, and waits a little where the server is full.

    Args:
        server: that is asked.
        known: the texts that a name may be answered with.
        tokens: of an answer.
        tally: where its answers are counted.
        seed: of what it asks.
        pause: seconds to wait after 429 and 503.
        hang_ups: the share of its requests that it leaves in the middle of the answer.
    """

    def __init__(
        self,
        server: Running,
        known: Mapping[str, set[str]],
        tokens: int,
        tally: Tally,
        seed: int,
        pause: float = 0.2,
        hang_ups: float = 0.05,
    ):
        self.server, self.known, self.tokens, self.tally = server, known, tokens, tally
        self.chance, self.pause, self.hang_ups = random.Random(seed), pause, hang_ups

    def work(self, until: float, at_least: int) -> None:
        """Ask until that time of the monotonic clock has come, and at least so many times."""
        asked = 0
        while asked < at_least or time.monotonic() < until:
            asked += 1
            if self.ask() in BUSY:
                time.sleep(self.pause * self.chance.uniform(0.5, 1.5))

    def ask(self) -> int | str:
        """One request; what became of it, which is counted."""
        name = self.chance.choice(sorted(self.known))
        stream, leave = self.chance.random() < 0.5, self.chance.random() < self.hang_ups
        begin, text, seen = time.monotonic(), None, ""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=300)
        body = {"model": name, "prompt": PROMPT, "max_tokens": self.tokens, "temperature": 0}
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body | {"stream": stream or leave}), HEADERS
            )
            answer = connection.getresponse()
            outcome: int | str = answer.status
            if leave and outcome == 200:
                answer.read(1)
                outcome = HUNG_UP
            else:
                seen = answer.read().decode()
                if outcome == 200:
                    text = in_chunks(seen) if stream or leave else json.loads(seen)["choices"][0]["text"]
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome, seen = LOST, repr(error)
        finally:
            connection.close()
        self.count(name, outcome, text, seen, time.monotonic() - begin)
        return outcome

    def count(self, name: str, outcome: int | str, text: str | None, seen: str, seconds: float) -> None:
        with self.tally.lock:
            self.tally.outcomes[outcome] += 1
            if text is not None:
                self.tally.seconds.append(seconds)
                self.tally.tokens += self.tokens
                if text not in self.known[name]:
                    self.tally.wrong.append((name, text))
            elif outcome not in (HUNG_UP, *BUSY):
                self.tally.lost.append(f"{outcome}: {seen[:300]}")


def in_chunks(events: str) -> str:
    """The text of a stream, which must have come to its end.

    Raises:
        ValueError: it has not.
    """
    if not events.endswith("data: [DONE]\n\n"):
        raise ValueError(f"the stream ends with {events[-100:]!r}")
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def crowd(clients: list[Client], seconds: float, at_least: int) -> list[threading.Thread]:
    """Begin the work of all clients, each in a thread of its own."""
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client.work, args=(until, at_least)) for client in clients]
    for thread in threads:
        thread.start()
    return threads
