"""What a server measures, in the form that Prometheus reads: by adapter, the requests, their times and tokens.

The label `adapter` is the version that answered, or "base"; a name that does not exist is counted as "unknown", so that
a caller who invents names makes no new series. Versions come and go for as long as a server runs: beyond `SERIES` of
them, those of the version that has not been used for the longest time are dropped. Prometheus keeps what it has read,
and takes a series that comes back for a counter that began again.
"""

import threading
from collections import Counter as Tally
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from labkit.serving.engine import Engine
from labkit.serving.requests import Completion

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BASE, UNKNOWN = "base", "unknown"
SERIES = 200  # values of the label `adapter`
RECENT = 1000  # answers whose times are kept one by one


class Metrics:
    """The counters of one server.

    Args:
        engine: whose queue and cache are read when they are asked for.
        series: values of the label `adapter` that are kept.

    Attributes:
        outcomes: how all requests ended, of whatever adapter.
        tokens: of all answers.
        recent: of the last answers, seconds to the end and to the first token (None without one).
    """

    def __init__(self, engine: Engine, series: int = SERIES):
        self.engine, self.registry, self.series = engine, CollectorRegistry(), series
        self.used: OrderedDict[str, None] = OrderedDict()  # values of the label, the longest unused one first
        self.lock = threading.Lock()
        self.outcomes: Tally[str] = Tally()
        self.tokens = 0
        self.recent: deque[tuple[float, float | None]] = deque(maxlen=RECENT)
        own: dict[str, Any] = {"registry": self.registry, "namespace": "labkit"}
        self.requests = Counter("requests", "answers by how they ended", ["adapter", "outcome"], **own)
        self.read = Counter("prompt_tokens", "tokens of prompts", ["adapter"], **own)
        self.reused = Counter("cached_tokens", "of them, computed before", ["adapter"], **own)
        self.written = Counter("completion_tokens", "tokens of answers", ["adapter"], **own)
        self.latency = Histogram(
            "request_seconds", "from submission to the end", ["adapter"], buckets=SECONDS, **own
        )
        self.first = Histogram(
            "first_token_seconds", "from submission to the first token", ["adapter"], buckets=SECONDS, **own
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def count(self, adapter: str, answer: Completion) -> None:
        """Count an answer."""
        seconds = answer.finished - answer.queued
        first = None if answer.first_token is None else answer.first_token - answer.queued
        with self.lock:
            self.use(adapter)
            self.requests.labels(adapter, answer.finish_reason).inc()
            self.read.labels(adapter).inc(answer.prompt_tokens)
            self.reused.labels(adapter).inc(answer.cached_tokens)
            self.written.labels(adapter).inc(len(answer.tokens))
            self.latency.labels(adapter).observe(seconds)
            if first is not None:
                self.first.labels(adapter).observe(first)
            self.outcomes[answer.finish_reason] += 1
            self.tokens += len(answer.tokens)
            self.recent.append((seconds, first))

    def refuse(self, adapter: str, code: str) -> None:
        """Count a request that was not taken."""
        with self.lock:
            self.use(adapter)
            self.requests.labels(adapter, code).inc()
            self.outcomes[code] += 1

    def use(self, adapter: str) -> None:
        """Make room for the series of `adapter`, if it has none."""
        self.used[adapter] = None
        self.used.move_to_end(adapter)
        if len(self.used) > self.series:
            unused, _ = self.used.popitem(last=False)
            for metric in (self.requests, self.read, self.reused, self.written, self.latency, self.first):
                metric.remove_by_labels({"adapter": unused})

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What the engine knows at this moment."""
        counts, cache = self.engine.adapters.counts, self.engine.adapters
        for name in ("hits", "misses", "evictions", "failures"):
            yield CounterMetricFamily(
                f"labkit_adapter_{name}", f"of adapters in memory: {name}", getattr(counts, name)
            )
        yield GaugeMetricFamily("labkit_adapter_bytes", "of adapters in memory", cache.nbytes)
        yield GaugeMetricFamily(
            "labkit_requests_writing", "requests being answered", len(self.engine.writing)
        )
        with self.engine.changed:
            waiting = len(self.engine.waiting)
        yield GaugeMetricFamily("labkit_requests_waiting", "requests that wait", waiting)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
