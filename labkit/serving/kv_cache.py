"""Keys and values of the rows that are being written, and of prefixes that may come again.

Keys and values are what a text became *in one model*. Those of the same text under another adapter, another version of
it, another strength or the base are other numbers. A cache that is looked up by text alone hands one tenant's state to
another, without any error: the answers are merely wrong. So a prefix is found by the `Identity` of what computed it
*and* the tokens. A reload of other weights under the same name is another identity: it has a hash of the weights.

A prefix is kept in blocks of 16 tokens, each found by all tokens up to its end. Prompts that begin alike share blocks.

Source: PagedAttention (Kwon et al. 2023), section 4.3; vLLM's prefix caching.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16  # tokens
SMALLEST = 64  # tokens that a row has room for at first


class Identity(NamedTuple):
    """What computes a row: `base`, a hash of its fingerprint; `adapter`, the version, or None; and `strength`."""

    base: str
    adapter: str | None = None
    strength: float = 1.0


class RowCache:
    """Keys and values of up to `slots` rows, each from its first token on; transformers' models write into it.

    A row's tokens begin at place 0, whatever other rows have, so rows join, leave and move without a shift of anything.

    Args:
        slots: rows at most.
    """

    is_sliding: tuple[bool, ...] = ()  # transformers asks which layers see a part of the text only

    def __init__(self, slots: int):
        self.slots = slots
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: (slots, heads, room, width)
        self.rows, self.places, self.total = slice(0), torch.empty(0, 0), 0

    def begin(self, first: int, starts: Sequence[int], tokens: int) -> None:
        """Say what the next forward pass is of: rows from slot `first` on, the tokens of each at `starts` and after."""
        self.rows = slice(first, first + len(starts))
        self.places = torch.tensor(starts)[:, None] + torch.arange(tokens)  # (rows, tokens)
        self.total = max(starts) + tokens

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(rows, 1, tokens, total), to be added to scores: each token sees its row up to itself."""
        unseen = torch.arange(self.total) > self.places[..., None]
        mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min)
        return mask[:, None].to(device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Take in those of new tokens, (rows, heads, tokens, width); those of the rows so far, (rows, heads, total, width)."""
        kept = self.with_room(layer_idx, keys, values)
        at = self.places.to(keys.device)
        rows = torch.arange(self.rows.start, self.rows.stop, device=keys.device)[:, None]
        for buffer, new in zip(kept, (keys, values)):
            buffer[rows, :, at] = new.transpose(1, 2)
        return kept[0][self.rows, :, : self.total], kept[1][self.rows, :, : self.total]

    def with_room(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, with room for `total` tokens: they grow to twice their size."""
        have = self.kept[layer][0].shape[2] if layer in self.kept else 0
        if have < self.total:
            room = max(SMALLEST, 1 << (self.total - 1).bit_length())
            made = tuple(
                new.new_zeros(self.slots, new.shape[1], room, new.shape[3]) for new in (keys, values)
            )
            for buffer, before in zip(made, self.kept.get(layer, ())):
                buffer[:, :, :have] = before
            self.kept[layer] = made
        return self.kept[layer]

    def get_seq_length(self, *_) -> int:
        """Tokens of the longest row, before the pass that began."""
        return self.total - self.places.shape[-1]

    def read(self, slot: int, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of a row's keys and values from token `start` to `stop`, by layer."""
        return [
            (keys[slot, :, start:stop].clone(), values[slot, :, start:stop].clone())
            for _, (keys, values) in sorted(self.kept.items())
        ]

    def write(self, slot: int, start: int, block: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Give a row keys and values that were read before, from token `start` on."""
        for layer, (keys, values) in enumerate(block):
            stop = start + keys.shape[1]
            self.total = max(self.total, stop)
            for buffer, new in zip(self.with_room(layer, keys[None], values[None]), (keys, values)):
                buffer[slot, :, start:stop] = new

    def move(self, source: int, target: int) -> None:
        """Give slot `target` what is in slot `source`."""
        for both in self.kept.values():
            for buffer in both if source != target else ():
                buffer[target] = buffer[source]

    def clear(self, slot: int) -> None:
        """Forget a row that went wrong: a masked token has the weight 0, and 0 times NaN is NaN."""
        for both in self.kept.values():
            for buffer in both:
                buffer[slot] = 0


class PrefixCache:
    """Blocks of keys and values by identity and tokens, the least recently used leaving first.

    Args:
        budget: bytes; 0 keeps nothing.
    """

    def __init__(self, budget: int):
        self.budget, self.nbytes = budget, 0
        self.blocks: OrderedDict[tuple[Identity, tuple[int, ...]], list[tuple[Tensor, Tensor]]] = (
            OrderedDict()
        )

    def find(self, identity: Identity, ids: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
        """The blocks with which `ids` begin, in their order; at least one token is left to compute."""
        found: list[list[tuple[Tensor, Tensor]]] = []
        while (stop := (len(found) + 1) * BLOCK) < len(ids):
            block = self.blocks.get((identity, tuple(ids[:stop])))
            if block is None:
                break
            found.append(block)
        self.touch(identity, ids, len(found))
        return found

    def add(self, identity: Identity, ids: Sequence[int], cache: RowCache, slot: int) -> None:
        """Keep the whole blocks of a row whose tokens `ids` are in `cache`."""
        if self.budget == 0:
            return
        for i in range(len(ids) // BLOCK):
            key = identity, tuple(ids[: (i + 1) * BLOCK])
            if key not in self.blocks:
                self.blocks[key] = cache.read(slot, i * BLOCK, (i + 1) * BLOCK)
                self.nbytes += bytes_of(self.blocks[key])
        self.touch(identity, ids, len(ids) // BLOCK)
        while self.nbytes > self.budget:
            self.nbytes -= bytes_of(self.blocks.popitem(last=False)[1])

    def touch(self, identity: Identity, ids: Sequence[int], blocks: int) -> None:
        """The last block first, so that none outlives those before it."""
        for i in reversed(range(blocks)):
            self.blocks.move_to_end((identity, tuple(ids[: (i + 1) * BLOCK])))

    def forget(self, adapter: str) -> None:
        """Drop what an adapter of this version computed."""
        for key in [key for key in self.blocks if key[0].adapter == adapter]:
            self.nbytes -= bytes_of(self.blocks.pop(key))


def bytes_of(block: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in block)
