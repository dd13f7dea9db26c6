"""Pages under a budget of bytes: what was used lately is in memory, the rest in a store.

Looking up a page that is in is a *hit*; one that has to be read first is a *fault*. Before a page comes in,
others go out, until

    resident = Σ nbytes(page), over the pages that are in   ≤   budget

Which go out is the *policy*: "lru", the page not used for longest, or "mru", the one used last. LRU is right
where the past tells the future. But an optimizer cycles through its parameters: what was not used for longest
comes next, and LRU never hits. Belady's rule, the best there is, evicts what is needed last: on a cycle, the
page just used.

A changed page is written when it goes out, and freed then; if the write fails, it stays.

Source: Belady, A study of replacement algorithms (1966).
"""

import os
import time
from collections import OrderedDict, deque

from torch import Tensor

from labkit.optim.page import KINDS, Layout, Page, PageEvent, lay_out
from labkit.optim.page_store import FileStore, Placed
from labkit.optim.pinned_store import PinnedStore

POLICIES = ("lru", "mru")
LOG_LENGTH = 1_000_000  # events; older ones are forgotten


class PageTable:
    """Pages by key, as many in fast memory as the budget allows.

    Args:
        store: where pages go.
        budget: bytes.
        policy: one of `POLICIES`.
        min_elements: tensors with fewer numbers are never paged, and do not count.

    Attributes:
        pages: {key: `Page`}.
        events: a log of `PageEvent`, the newest last.
        counts: {kind of event: how many there were}.
        bytes_in, bytes_out: moved between the tiers.
        seconds_waiting: spent waiting for the store (on CUDA by the host only, which is next to nothing).
        resident_bytes, peak_bytes: in fast memory, now and at most.
    """

    def __init__(self, store: FileStore | PinnedStore, budget: int, policy: str, min_elements: int):
        self.store, self.budget, self.policy, self.min_elements = store, budget, policy, min_elements
        self.owner = os.getpid()
        self.pages: dict[object, Page] = {}
        self.hot: OrderedDict[Page, None] = OrderedDict()  # the one used last is last
        self.current: Page | None = None  # in use: stays in
        self.step, self.untidy = 0, 0
        self.resident_bytes, self.peak_bytes, self.bytes_in, self.bytes_out = 0, 0, 0, 0
        self.seconds_waiting = 0.0
        self.events: deque[PageEvent] = deque(maxlen=LOG_LENGTH)
        self.counts = dict.fromkeys(KINDS, 0)

    @property
    def total_bytes(self) -> int:
        """Of all pages, in or out."""
        return sum(page.nbytes for page in self.pages.values())

    @property
    def largest(self) -> Page:
        """The page of the most bytes: no budget may be less."""
        return max(self.pages.values(), key=lambda page: page.nbytes)

    @property
    def exempt_bytes(self) -> int:
        """Of tensors that are never paged: below `min_elements`, or on another device."""
        return sum(page.exempt for page in self.pages.values())

    @property
    def hit_rate(self) -> float:
        """Hits among all look-ups of pages that existed."""
        return self.counts["hit"] / max(1, self.counts["hit"] + self.counts["fault"])

    def page(self, key: object, name: str | None = None) -> Page:
        """The page of a key, new if need be."""
        if key not in self.pages:
            self.pages[key] = Page(key, name or str(len(self.pages)))
        return self.pages[key]

    def check_owner(self) -> None:
        """Raise a `RuntimeError` in a process that was forked from the one that made this: both would write to
        one store, and what reads ahead is a thread of the parent's alone."""
        if os.getpid() != self.owner:
            raise RuntimeError(
                f"process {os.getpid()} was forked from process {self.owner}, which pages the state of this "
                "optimizer, and they would share its store. The state of the parent is intact. To train here, "
                "call detach_paging(optimizer, keep_state=False), and load a state_dict() made before the fork"
            )

    # --- coming in

    def touch(self, page: Page) -> dict:
        """The state of a page, read if it is out; it may be changed until the next call."""
        self.check_owner()
        kind = "hit"
        if page.state is None:
            kind = "fault" if page.exists else "create"
            self.bring(page)
        self.wait(page)
        page.changed = True
        self.hot.move_to_end(page)
        self.note(page, kind)
        return page.state

    def prefetch(self, page: Page) -> None:
        """Start to read a page, if it is out and fits beside the current one."""
        beside = self.current.nbytes if self.current else 0
        if page.state is None and page.exists and beside + page.nbytes <= self.budget:
            self.bring(page, now=False)
            self.note(page, "prefetch")

    def bring(self, page: Page, now: bool = True) -> None:
        """Make room, and read; or, if not `now`, start to read in the background."""
        self.make_room(page.nbytes)
        if page.exists:
            frame = self.store.memory(page.nbytes)
            if now:
                started = time.perf_counter()
                self.store.read(page.slot, [Placed(0, frame)])
                self.bytes_in += page.nbytes
                self.seconds_waiting += time.perf_counter() - started
            else:
                page.coming = self.store.start_reading(page.slot, [Placed(0, frame)])
            page.open(frame)
        else:
            page.state = dict(page.layout)
        self.hot[page] = None
        self.resident_bytes += page.nbytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def wait(self, page: Page) -> None:
        """Wait until the page has been read."""
        if page.coming is None:
            return
        self.check_owner()
        started = time.perf_counter()
        try:
            page.coming.result()
        except BaseException:
            page.coming = None
            self.forget(page)  # the store still has it
            raise
        page.coming = None  # only now: an interrupt before this line waits again
        self.bytes_in += page.nbytes
        self.seconds_waiting += time.perf_counter() - started

    # --- going out

    def make_room(self, nbytes: int) -> None:
        """Page out until `nbytes` more fit."""
        for page in list(self.hot) if self.policy == "lru" else list(reversed(self.hot)):
            if self.resident_bytes + nbytes <= self.budget:
                return
            if page is not self.current:
                self.page_out(page)

    def page_out(self, page: Page) -> None:
        """Write a page to the store if it was changed, and free it. If that fails, it stays."""
        self.wait(page)
        if page.changed:
            self.settle(page)
            started = time.perf_counter()
            self.store.write(page.slot, page.placed())
            self.seconds_waiting += time.perf_counter() - started
            self.bytes_out += page.nbytes
        self.forget(page)
        self.note(page, "evict")

    def set_budget(self, budget: int) -> None:
        """Another budget from now on; what it does not hold goes out at once.

        Raises:
            ValueError: it is less than one of the pages. Nothing was changed.
        """
        self.check_owner()
        if self.pages:
            self.check_size(self.largest, budget)
        self.budget = budget
        self.make_room(0)

    def tidy(self, page: Page) -> None:
        """Called after a page was used: return freed memory to the system, once per quarter of the budget."""
        self.untidy += page.nbytes
        if 4 * self.untidy >= self.budget:
            self.store.give_back()
            self.untidy = 0

    def forget(self, page: Page) -> None:
        """Free the memory of a page."""
        if page in self.hot:
            del self.hot[page]
            self.resident_bytes -= page.nbytes
        if page.frame is not None:
            self.store.let_go(page.frame)
        page.state, page.frame, page.changed = None, None, False

    def drop(self, page: Page) -> None:
        """Give up a page and its slot."""
        if page.coming is not None:
            self.wait(page)
        self.forget(page)
        if page.slot is not None:
            self.store.release(page.slot)

    def close(self) -> None:
        """Free all memory and the store; the log, the counts and the sizes stay."""
        self.store.close()
        for page in list(self.hot):
            page.coming = None
            self.forget(page)
        for page in self.pages.values():
            page.slot = None  # in host memory, it is the memory

    # --- sizes and slots

    def plan(self, pages: dict[Page, dict]) -> None:
        """Take in pages that will look like these states (of meta tensors, say), and reserve their slots.

        Raises:
            ValueError: one of them is more than the budget.
            OSError: together they are more than the store has. No page was taken in.
            RuntimeError: see `check_owner`.
        """
        self.check_owner()
        for page, state in pages.items():
            _, page.nbytes, page.exempt = self.lay_out(page, state)
        if pages:
            self.check_size(max(pages, key=lambda page: page.nbytes), self.budget)
        try:
            for page in pages:
                page.slot = self.store.reserve(page.nbytes)
        except BaseException:
            for page in pages:
                if page.slot is not None:
                    self.store.release(page.slot)
            raise
        self.pages |= {page.key: page for page in pages}

    def settle(self, page: Page) -> None:
        """Take down what a page consists of now, and see that its slot is large enough."""
        layout, nbytes, exempt = self.lay_out(page, page.state)
        if page.slot is None or nbytes > page.slot.size:
            slot = self.store.reserve(nbytes)
            if page.slot is not None:
                self.store.release(page.slot)
            page.slot = slot
        if page in self.hot:
            self.resident_bytes += nbytes - page.nbytes
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
        page.layout, page.nbytes, page.exempt = layout, nbytes, exempt

    def lay_out(self, page: Page, state: dict) -> Layout:
        """See `labkit.optim.page.lay_out`."""
        return lay_out(state, page.name, self.store.device_type, self.min_elements)

    def check_size(self, page: Page, budget: int) -> None:
        """Raise a `ValueError` if the page alone is more than the budget."""
        if page.nbytes > budget:
            raise ValueError(
                f"budget_bytes={budget} is less than the state of parameter {page.name}, {page.nbytes} "
                f"bytes; the state of one parameter has to fit: give at least {page.nbytes}"
            )

    # --- whole states

    def put(self, key: object, state: dict) -> None:
        """Write a state to the store, as a copy, in place of what the key had."""
        self.check_owner()
        page = self.page(key)
        new = Page(key, page.name, state=dict(state))
        self.settle(new)
        self.check_size(new, self.budget)
        self.store.write(new.slot, new.placed())
        new.state = None
        self.drop(page)
        self.pages[key] = new

    def copy(self, page: Page) -> dict:
        """The state of a page as a copy; the page stays where it is."""
        self.check_owner()
        self.wait(page)
        if page.state is None:
            page = Page(page.key, page.name, layout=page.layout, slot=page.slot)
            page.open(self.store.memory(page.slot.size))
            self.store.read(page.slot, [Placed(0, page.frame)])
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in page.state.items()}

    def note(self, page: Page, kind: str) -> None:
        """Log what happened to a page."""
        self.counts[kind] += 1
        self.events.append(PageEvent(self.step, page.name, kind, page.nbytes, self.resident_bytes))
