"""A dictionary of tensors under a budget of bytes: what was used lately is in fast memory, the rest in a store.

A *page* is what one key holds, such as the optimizer state of one parameter. Looking up a page that is in is a *hit*; one that has
to be read from the store first is a *fault*. Before a page comes in, others go out, until

    resident = Σ nbytes(page), over the pages that are in   ≤   budget

Which go out is the *policy*: "lru", the one that was not used for longest, or "mru", the one that was used last. LRU is right where the
past tells the future. An optimizer goes round all its parameters in the same order, and on a cycle the page not used for
longest is the very one that comes next: LRU then never hits at all. The best that can be known, Belady's rule, throws out what
is needed last, and on a cycle that is the page that was just used.

A page that was changed is written when it goes out, and only then is its memory freed; if the write fails, it stays. One that was
only read goes out for free.

A page that comes in gets memory of its own, straight from the system (`FileStore.memory`), and sizes are counted in the
system's frames of 4 KiB. Why not `torch.empty`: the C library keeps freed blocks for later and rarely finds one that fits, and under a
budget of 60 MB the process was measured to hold 421 MB, most of it "free". The optimizer's own temporaries go that way too, so that
the C library is told now and then to give back what it does not use (`tidy`).

Source: Belady, A study of replacement algorithms for a virtual-storage computer (1966).
"""

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from numbers import Number
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.optim.page_store import FileStore, PinnedStore, Placed, Slot, rounded

POLICIES = ("lru", "mru")
KINDS = ("create", "hit", "fault", "prefetch", "evict")
LOG_LENGTH = 1_000_000  # events; older ones are forgotten


class Event(NamedTuple):
    """What happened to a page, and how much was resident afterwards, in bytes. `kind` is one of `KINDS`."""

    step: int
    name: str
    kind: str
    nbytes: int
    resident: int


@dataclass(eq=False)
class Page:
    """What one key holds. `state` is None while it is out; `layout` says how to make it again.

    Attributes:
        layout: {key: (distance from the start of the page, meta tensor), or a value that is never paged}.
        nbytes: of the page, in whole frames; exempt: of the tensors that are never paged.
        frame: (nbytes,) uint8, the memory of a page that was read; None for tensors that came from elsewhere.
        changed: since it was read.
        coming: a read under way.
    """

    key: object
    name: str
    nbytes: int = 0
    exempt: int = 0
    state: dict | None = None
    layout: dict = field(default_factory=dict)
    frame: Tensor | None = None
    slot: Slot | None = None
    changed: bool = False
    coming: object = None

    @property
    def exists(self) -> bool:
        """Was anything ever put in? A page may be planned, with a size and a slot, before."""
        return bool(self.layout) or bool(self.state)

    def placed(self) -> list[Placed]:
        """The tensors that are paged, with their places in the slot."""
        return [Placed(v[0], self.state[key]) for key, v in self.layout.items() if isinstance(v, tuple)]

    def open(self, frame: Tensor) -> None:
        """Make the state of views into `frame`, whatever it holds."""
        self.frame, self.state = frame, {}
        for key, v in self.layout.items():
            if isinstance(v, tuple):
                at, shape = v
                flat = frame[at : at + shape.nbytes].view(shape.dtype)
                v = flat.as_strided(shape.shape, shape.stride())
            self.state[key] = v

    def is_framed(self) -> bool:
        """Are all tensors that are paged where they were read to? Not if they are new, or were replaced."""
        if self.frame is None:
            return not self.placed()
        start = self.frame.data_ptr()
        return all(tensor.data_ptr() == start + at for at, tensor in self.placed())


class PageTable(MutableMapping):
    """{tensor: {name: tensor or number}} under a budget.

    What `table[key]` returns is good until the next look-up pages it out again. `items()` and `values()` give copies, and
    move nothing.

    Args:
        store: where pages go.
        budget: bytes.
        policy: one of `POLICIES`.
        min_elements: tensors with fewer numbers are never paged, and do not count.

    Attributes:
        events: a log of `Event`, the newest last.
        counts: {kind of event: how many there were}.
        bytes_in, bytes_out: moved between the tiers.
        seconds_waiting: stood still for the store (on CUDA only the host's waiting, which is next to none).
        resident_bytes, peak_bytes: in fast memory, now and at most.
    """

    def __init__(self, store: FileStore | PinnedStore, budget: int, policy: str, min_elements: int):
        self.store, self.budget, self.policy, self.min_elements = store, budget, policy, min_elements
        self.pages: dict[object, Page] = {}
        self.hot: OrderedDict[Page, None] = OrderedDict()  # the one used last is last
        self.current: Page | None = None  # in use: stays in
        self.step, self.untidy = 0, 0
        self.resident_bytes, self.peak_bytes, self.bytes_in, self.bytes_out = 0, 0, 0, 0
        self.seconds_waiting = 0.0
        self.events: deque[Event] = deque(maxlen=LOG_LENGTH)
        self.counts = dict.fromkeys(KINDS, 0)

    # --- as a dictionary

    def __getitem__(self, key) -> dict:
        page = self.page(key)
        return page.state if page is self.current else self.touch(page)

    def __setitem__(self, key, state: dict) -> None:
        page, new = self.page(key), Page(key, self.page(key).name, state=dict(state))
        self.settle(new)
        self.check_size(new)
        self.store.write(new.slot, new.placed())  # a copy: `state` stays its owner's
        new.state = None
        self.drop(page)
        self.pages[key] = new

    def __delitem__(self, key) -> None:
        if key not in self:
            raise KeyError(key)
        self.drop(self.pages.pop(key))

    def __contains__(self, key) -> bool:
        return key in self.pages and self.pages[key].exists

    def __iter__(self) -> Iterator:
        return iter([key for key, page in self.pages.items() if page.exists])

    def __len__(self) -> int:
        return sum(page.exists for page in self.pages.values())

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401  # `self.get` is this very method

    def items(self):
        return ((key, self.copy(self.pages[key])) for key in self)

    def values(self):
        return (state for _, state in self.items())

    def __reduce__(
        self,
    ):  # so that a copy of an optimizer (deepcopy, pickle) has all of its state in memory, and no pager
        return defaultdict, (dict, dict(self.items()))

    # --- pages

    @property
    def total_bytes(self) -> int:
        """Of all pages, in or out."""
        return sum(page.nbytes for page in self.pages.values())

    @property
    def exempt_bytes(self) -> int:
        """Of tensors that are never paged: below `min_elements`, or on another device."""
        return sum(page.exempt for page in self.pages.values())

    @property
    def hit_rate(self) -> float:
        """Hits among all look-ups of pages that existed."""
        return self.counts["hit"] / max(1, self.counts["hit"] + self.counts["fault"])

    def page(self, key, name: str | None = None) -> Page:
        """The page of a key, new if need be."""
        if key not in self.pages:
            self.pages[key] = Page(key, name or str(len(self.pages)))
        return self.pages[key]

    def touch(self, page: Page) -> dict:
        """The state of a page, read if it is out; it may be changed until the next call."""
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
        if page.exists and page.nbytes:
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
        """Until the page has been read."""
        if page.coming is None:
            return
        started, coming, page.coming = time.perf_counter(), page.coming, None
        try:
            coming.result()
        except BaseException:
            self.forget(page)  # the store still has it
            raise
        self.bytes_in += page.nbytes
        self.seconds_waiting += time.perf_counter() - started

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

    def tidy(self, page: Page) -> None:
        """Called after a page was worked with: return freed memory to the system, each time a quarter of the budget was."""
        self.untidy += page.nbytes
        if 4 * self.untidy >= self.budget:
            self.store.give_back()
            self.untidy = 0

    def forget(self, page: Page) -> None:
        """Free the memory of a page."""
        if page in self.hot:
            del self.hot[page]
            self.resident_bytes -= page.nbytes
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

    def plan(self, pages: dict[Page, dict]) -> None:
        """Take in pages that are going to look like these states, made of meta tensors, say; reserve what they need.

        Raises:
            ValueError: one of them is more than the budget.
            OSError: together they are more than the store has. No page was taken in.
        """
        for page, state in pages.items():
            _, page.nbytes, page.exempt = self.lay_out(state, page.name)
        if pages:
            self.check_size(max(pages, key=lambda page: page.nbytes))
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
        layout, nbytes, exempt = self.lay_out(page.state, page.name)
        if page.slot is None or nbytes > page.slot.size:
            slot = self.store.reserve(nbytes)
            if page.slot is not None:
                self.store.release(page.slot)
            page.slot = slot
        if page in self.hot:
            self.resident_bytes += nbytes - page.nbytes
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
        page.layout, page.nbytes, page.exempt = layout, nbytes, exempt

    def lay_out(self, state: dict, name: str) -> tuple[dict, int, int]:
        """The layout of a state, the bytes of its page, and those of tensors that are exempt."""
        layout, end, exempt = {}, 0, 0
        for key, value in state.items():
            if value is None or isinstance(value, (Number, str)):
                layout[key] = value
            elif type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                raise TypeError(
                    f"state[{key!r}] of parameter {name} is a {type(value).__name__}; only dense tensors, numbers, strings "
                    "and None can be paged. Use this optimizer without paging"
                )
            elif value.numel() < self.min_elements or value.device.type not in (
                self.store.device_type,
                "meta",
            ):
                # AdamW's step count, for one, is on the CPU even if the parameter is not
                layout[key], exempt = value, exempt + value.nbytes
            else:
                shape = torch.empty_like(value, device="meta")
                if shape.stride() != value.stride():  # expanded, or with gaps
                    state[key] = value = value.contiguous()
                    shape = torch.empty_like(value, device="meta")
                layout[key] = (end, shape)
                end += -(-value.nbytes // 64) * 64
        return layout, rounded(end), exempt

    def check_size(self, page: Page) -> None:
        """Raise a `ValueError` if the page alone is more than the budget."""
        if page.nbytes > self.budget:
            raise ValueError(
                f"budget_bytes={self.budget} is less than the state of parameter {page.name}, {page.nbytes} bytes; the state "
                f"of one parameter has to fit: give at least {page.nbytes}"
            )

    def copy(self, page: Page) -> dict:
        """The state of a page as a copy; the page stays where it is."""
        self.wait(page)
        if page.state is None:
            page = Page(page.key, page.name, layout=page.layout, slot=page.slot)
            page.open(self.store.memory(page.slot.size))
            self.store.read(page.slot, [Placed(0, page.frame)])
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in page.state.items()}

    def note(self, page: Page, kind: str) -> None:
        self.counts[kind] += 1
        self.events.append(Event(self.step, page.name, kind, page.nbytes, self.resident_bytes))
