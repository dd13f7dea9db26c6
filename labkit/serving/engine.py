"""Continuous batching: requests join and leave between steps, and each writes what it would write alone.

A step reads some tokens of the prompts that came in, then gives every row that is being written its next token, all in
one forward pass, whatever adapters they use. A row that ends makes room at once: nobody waits for the longest answer.

    engine = Engine(bank, resolve=registry.resolve)
    stream = engine.submit(GenerationRequest(ids, adapter="support@production"))
    threading.Thread(target=engine.run).start()         # or engine.step(), again and again
    for token in stream: ...

A name is resolved when a request is submitted. An alias that moves to another version meanwhile changes nothing of what
is being written; an unknown one is an error, and never the base.

Source: Orca (Yu et al. 2022), iteration-level scheduling.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from labkit.serving.adapter_cache import AdapterCache
from labkit.serving.batched import AdapterBank
from labkit.serving.kv_cache import Identity, PrefixCache
from labkit.serving.requests import (
    ERROR,
    LENGTH,
    STOP,
    TIMEOUT,
    Draining,
    Full,
    GenerationRequest,
    Listener,
    NewToken,
    Stream,
)
from labkit.serving.rows import EngineLimits, ServedRow
from labkit.serving.sampling import choose
from labkit.serving.scheduling import FairQueue
from labkit.serving.stepping import Stepper
from labkit.training.limits import context_of

PAUSE = 0.005  # seconds between looks at adapters that are being loaded, when there is nothing else to do


class Engine:
    """Writes the answers to many requests at once. One thread steps; any thread submits, reads and cancels.

    Args:
        bank: a base and its adapters; the engine loads and unloads them.
        resolve: by the name of an adapter, its `Source` (or a registry's version); raises `LookupError` for none.
            A mapping from names to sources will do.
        limits: what is taken on.
        adapters: which adapters are in memory; by default with 256 MiB.
        clock: seconds that only go up.

    Raises:
        ValueError: the model cannot be stepped; see `labkit.serving.stepping`.
    """

    def __init__(
        self,
        bank: AdapterBank,
        resolve: Callable[[str], Any] | Mapping[str, Any],
        limits: EngineLimits | None = None,
        adapters: AdapterCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.bank, self.limits, self.clock = bank, limits or EngineLimits(), clock
        self.resolve = resolve.__getitem__ if isinstance(resolve, Mapping) else resolve
        self.adapters = adapters or AdapterCache(bank, 2**28)
        self.stepper, self.base = Stepper(bank, self.limits.rows), bank.base
        self.prefixes = PrefixCache(self.limits.prefix_bytes)
        lengths = [length for length in (self.limits.context, context_of(bank.model)) if length is not None]
        self.context = min(lengths) if lengths else 2**20
        self.waiting: FairQueue[ServedRow] = FairQueue()
        self.writing: list[ServedRow] = []  # in the order of their slots
        self.reading: ServedRow | None = None  # in the slot behind them
        self.is_draining = False
        self.changed = threading.Condition()

    def submit(self, request: GenerationRequest, listener: Listener | None = None) -> Stream:
        """Take on a request; from any thread.

        Raises:
            LookupError: there is no adapter of that name.
            ValueError: it does not fit: ids that the model does not have, or too many tokens.
            Full: too many wait.
            Draining: no more are taken.
        """
        self.check_fits(request)
        source = None if request.adapter is None else self.resolve(request.adapter)
        stream = Stream(request, listener)
        row = ServedRow.of(stream, source, self.clock(), self.limits.seconds)
        with self.changed:
            if self.is_draining:
                raise Draining("the engine is ending, and takes no more requests")
            if len(self.waiting) >= self.limits.queue:
                raise Full(f"{self.limits.queue} requests wait already; try again later")
            self.waiting.put(request.tenant, row)
            self.changed.notify_all()
        return stream

    def check_fits(self, request: GenerationRequest) -> None:
        """Raise a `ValueError` unless the model can read a request and write its answer."""
        largest = max((*request.prompt, *request.stop_ids))
        if largest >= self.stepper.vocabulary:
            raise ValueError(f"token id {largest}: the model has {self.stepper.vocabulary}")
        if request.max_new_tokens > self.limits.new_tokens:
            raise ValueError(
                f"max_new_tokens={request.max_new_tokens}; at most {self.limits.new_tokens} are written"
            )
        if len(request.prompt) + request.max_new_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit into "
                f"{self.context}"
            )

    @property
    def is_idle(self) -> bool:
        """Is there no request, neither waiting nor being written?"""
        with self.changed:
            return not (self.writing or self.reading or len(self.waiting))

    def run(self) -> None:
        """Step until the engine is drained, and sleep while there is nothing to do."""
        while not (self.is_draining and self.is_idle):
            try:
                computed = self.step()
            except Exception as error:  # nobody waits forever for an answer that does not come
                self.end_all(error)
                continue
            if not computed:
                with self.changed:
                    self.changed.wait(None if not len(self.waiting) and not self.is_draining else PAUSE)

    def drain(self) -> None:
        """Take no more requests; `run` returns when those that there are have been answered."""
        with self.changed:
            self.is_draining = True
            self.changed.notify_all()

    def step(self) -> bool:
        """Read prompts, and write one token of each row. Was there anything to compute?"""
        self.end_what_is_over()
        self.fetch_adapters()
        return self.read_prompts() | self.write_tokens()

    def end_what_is_over(self) -> None:
        """End what was cancelled, and what has taken too long."""
        now = self.clock()
        for row in self.all_rows():
            if row.stream.wanted_end:
                self.end(row, row.stream.wanted_end)
            elif now > row.deadline:
                self.end(row, TIMEOUT)

    def fetch_adapters(self) -> None:
        """Have the adapters of waiting requests loaded; a request whose adapter cannot be ends with the error."""
        with self.changed:
            rows = [row for row in self.waiting if row.key is not None]
        for row in rows:
            try:
                self.adapters.request(row.key, row.path)
            except Exception as error:  # of a damaged folder, another base: this request's own
                self.end(row, ERROR, error)

    def has_adapter(self, row: ServedRow) -> bool:
        """Hold the adapter of a waiting request, if it is in memory, so that it stays."""
        version = None
        if row.key is not None:
            try:
                version = self.adapters.acquire(row.key).version
            except KeyError:
                return False
        row.identity = Identity(self.base, version, row.request.strength if version else 1.0)
        return True

    def read_prompts(self) -> bool:
        """Read as many tokens of prompts as a step may, one prompt after the other."""
        left = self.limits.prompt_tokens
        while left > 0 and (self.reading is not None or self.admit()):
            row = self.reading
            count = min(left, len(row.ids) - row.read)
            left -= count
            logits = self.forward([row], len(self.writing), count)
            if self.reading is row and row.read == len(row.ids):
                self.prefixes.add(row.identity, row.ids, self.stepper.cache, len(self.writing))
                self.reading = None
                self.writing.append(row)
                self.extend(row, logits[0])
        return left < self.limits.prompt_tokens

    def admit(self) -> bool:
        """Let the next request begin, in the slot behind the others, with what is known of its prompt."""
        slot = len(self.writing)
        with self.changed:
            row = self.waiting.take(self.has_adapter) if slot < self.limits.rows else None
            if row is None:
                return False
            self.reading = row
        for block in self.prefixes.find(row.identity, row.ids):
            self.stepper.cache.write(slot, row.read, block)
            row.read = row.reused = row.read + block[0][0].shape[1]
        with self.changed:
            self.waiting.charge(row.request.tenant, read=len(row.ids) - row.reused)
        return True

    def write_tokens(self) -> bool:
        """One more token for each row that is being written."""
        rows = list(self.writing)
        logits = self.forward(rows, 0, 1) if rows else None
        for row, of_row in zip(rows, () if logits is None else logits):
            if row in self.writing:
                self.extend(row, of_row)
        return bool(rows)

    def forward(self, rows: Sequence[ServedRow], first: int, count: int) -> Tensor | None:
        """Logits after the next `count` tokens of rows that stand from slot `first` on.

        A row whose logits are not finite ends, and the others go on. If the pass itself fails, all of them end.
        """
        try:
            ids = [row.ids[row.read : row.read + count] for row in rows]
            logits = self.stepper.step(first, [row.read for row in rows], ids, [row.use for row in rows])
        except Exception as error:  # such as memory: these requests fail, the engine goes on
            for row in rows:
                self.fail(row, error)
            return None
        fine = logits.amax(-1).isfinite().tolist()
        for row, is_fine in zip(rows, fine):
            row.read += count
            if not is_fine:
                self.fail(row, ValueError("the logits are not finite: a weight or the strength is too large"))
        return logits

    def extend(self, row: ServedRow, logits: Tensor) -> None:
        """Choose the next token of a row, and end the row if it is the last."""
        token = NewToken(*choose(logits, row.request.sampling, row.generator))
        with self.changed:
            self.waiting.charge(row.request.tenant, written=1)
        row.first_token = self.clock() if row.first_token is None else row.first_token
        if token.id in row.request.stop_ids:
            self.end(row, STOP)
            return
        row.ids.append(token.id)
        row.written.append(token)
        row.stream.put(token)
        if row.stream.wanted_end or len(row.written) == row.request.max_new_tokens:
            self.end(row, row.stream.wanted_end or LENGTH)

    def end(self, row: ServedRow, reason: str, error: Exception | None = None) -> None:
        """Take a request out, wherever it is, and hand over its answer."""
        if row.identity is None:
            with self.changed:
                self.waiting.remove(row.request.tenant, row)
            if row.key is not None:
                self.adapters.abandon(row.key)
        else:
            if reason != ERROR:
                self.prefixes.add(row.identity, row.ids[: row.read], self.stepper.cache, self.slot_of(row))
            self.leave(row)
            if row.key is not None:
                self.adapters.release(row.key)
        row.stream.put(row.completion(reason, error, self.clock()))

    def end_all(self, error: Exception) -> None:
        """End every request with an error of the engine's own."""
        for row in self.all_rows():
            self.end(row, ERROR, error)

    def all_rows(self) -> list[ServedRow]:
        with self.changed:
            return [*self.waiting, *self.writing, *([self.reading] if self.reading else [])]

    def fail(self, row: ServedRow, error: Exception) -> None:
        """End a request that went wrong, and leave nothing of it where another one will be."""
        self.stepper.cache.clear(self.slot_of(row))
        self.end(row, ERROR, error)

    def slot_of(self, row: ServedRow) -> int:
        return len(self.writing) if row is self.reading else self.writing.index(row)

    def leave(self, row: ServedRow) -> None:
        """Free the slot of a row: the last one moves there, so that all stand together."""
        if row is self.reading:
            self.reading = None
            return
        slot, last = self.slot_of(row), len(self.writing) - 1
        self.stepper.cache.move(last, slot)
        self.writing[slot] = self.writing[last]
        self.writing.pop()
        if self.reading is not None:
            self.stepper.cache.move(last + 1, last)
