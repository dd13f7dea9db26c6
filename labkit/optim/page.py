"""A page: what one key of a `PageTable` holds, such as the optimizer state of one parameter.

The tensors of a page lie one after the other in one piece of memory, its *frame*, each from a multiple of 64
bytes on. The *layout* says where, and of which shape. So a page goes to the store and comes back with a
single read, and its tensors are views into the frame. Numbers, strings and small tensors stay in the layout
and never move.
"""

from dataclasses import dataclass, field
from numbers import Number
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.optim.page_store import PendingRead, Placed, Slot, rounded

KINDS = ("create", "hit", "fault", "prefetch", "evict")
ALIGNMENT = 64  # bytes, between the tensors of a page


class PageEvent(NamedTuple):
    """What happened to a page, and how much was resident afterwards, in bytes. `kind` is one of `KINDS`."""

    step: int
    name: str
    kind: str
    nbytes: int
    resident: int


class Place(NamedTuple):
    """Where a tensor lies in its page, in bytes from the start, and a meta tensor of its shape."""

    at: int
    shape: Tensor


class Layout(NamedTuple):
    """What a state consists of.

    Attributes:
        entries: {key: the `Place` of a tensor, or a value that is never paged}.
        nbytes: of the page, in whole frames of the system.
        exempt: bytes of the tensors that are never paged.
    """

    entries: dict
    nbytes: int
    exempt: int


@dataclass(eq=False)
class Page:
    """What one key holds.

    Attributes:
        key, name: of the parameter.
        nbytes, exempt, layout: see `Layout`.
        state: {key: tensor or value}; None while the page is out, and `layout` says how to make it again.
        frame: (nbytes,) uint8, the memory of a page that was read; None for tensors that came from elsewhere.
        slot: its place in the store.
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
    coming: PendingRead | None = None

    @property
    def exists(self) -> bool:
        """Was anything ever put in? A page may be planned, with a size and a slot, before."""
        return bool(self.layout) or bool(self.state)

    def placed(self) -> list[Placed]:
        """The tensors that are paged, with their places in the slot."""
        return [Placed(v.at, self.state[key]) for key, v in self.layout.items() if isinstance(v, Place)]

    def open(self, frame: Tensor) -> None:
        """Make the state of views into `frame`, whatever it holds."""
        self.frame, self.state = frame, {}
        for key, value in self.layout.items():
            if isinstance(value, Place):
                at, shape = value
                flat = frame[at : at + shape.nbytes].view(shape.dtype)
                value = flat.as_strided(shape.shape, shape.stride())
            self.state[key] = value

    def is_framed(self) -> bool:
        """Are all tensors that are paged where they were read to? Not if they are new, or were replaced."""
        if self.frame is None:
            return not self.placed()
        start = self.frame.data_ptr()
        return all(
            t.data_ptr() == start + at for at, t in self.placed() if t.numel()
        )  # empty ones are nowhere


def lay_out(state: dict, name: str, device_type: str, min_elements: int) -> Layout:
    """Place the tensors of a state one after the other; one with gaps is made contiguous, in `state` too.

    Args:
        state: {key: tensor, number, string or None}.
        name: of the parameter, for the message.
        device_type: of the tensors that are paged; those on other devices are exempt.
        min_elements: tensors with fewer numbers are exempt.

    Raises:
        TypeError: a value of another type.
    """
    entries: dict = {}
    end, exempt = 0, 0
    for key, value in state.items():
        if value is None or isinstance(value, (Number, str)):
            entries[key] = value
        elif type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise TypeError(
                f"state[{key!r}] of parameter {name} is a {type(value).__name__}; only dense tensors, "
                "numbers, strings and None can be paged. Use this optimizer without paging"
            )
        elif value.numel() < min_elements or value.device.type not in (device_type, "meta"):
            # AdamW's step count, for one, is on the CPU even if the parameter is not
            entries[key] = value
            exempt += value.nbytes
        else:
            shape = torch.empty_like(value, device="meta")
            if shape.stride() != value.stride():  # expanded, or with gaps
                state[key] = value = value.contiguous()
                shape = torch.empty_like(value, device="meta")
            entries[key] = Place(end, shape)
            end += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(entries, rounded(end), exempt)
