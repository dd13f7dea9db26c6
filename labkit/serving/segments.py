"""Rows of one batch that use different adapters: sorted, cut into segments, and added to the base's output.

The base multiplies all rows at once. What an adapter adds is a small product of its own rows, so the rows are sorted
by adapter, a sum over the counts (a prefix sum) says where each adapter's rows begin, and every such *segment* is one
pair of products:

    y[rows] += s (x[rows] A^T) B^T

Rows without an adapter are in no segment: their output is the base's, bit for bit. Factors of one
shape could be one batched product, but each A and B would have to be copied into it at every step: at 16 rows, as much
memory traffic as the base itself. Segments read each factor where it is.

Source: S-LoRA (Sheng et al. 2023), section 5; Punica (Chen et al. 2023). Agrees with: PEFT `tuners/lora/layer.py`,
`_mixed_batch_forward`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Factors(NamedTuple):
    """What an adapter has for one layer: A (r, in), B (out, r), and the factor of their product."""

    A: Tensor
    B: Tensor
    scaling: float


class Segment(NamedTuple):
    """The rows `start` to `stop`, without it, of a sorted batch, all with one adapter at one strength."""

    start: int
    stop: int
    factors: Factors  # the scaling times the strength


@dataclass
class Part:
    """What one layer does for the rows of a batch.

    Attributes:
        order: (adapted rows,) the rows, as the segments count them.
        together: the same rows as a slice, where they stand together and in order; else None.
        segments: which of them use what.
        table: the same for `labkit.serving.few_rows`, once that has made it.
    """

    order: Tensor
    together: slice | None
    segments: list[Segment]
    table: Any = None


class Sorted(NamedTuple):
    """Rows by key: `order` (rows,) are their indices, those of the i-th key from `starts[i]` to `starts[i + 1]`."""

    keys: list
    order: Tensor
    starts: list[int]


def sort_rows(keys: Sequence[Hashable | None]) -> Sorted:
    """Rows sorted by their keys, in the order in which the keys first appear; rows of None are left out.

    >>> by_key = sort_rows(["b", None, "a", "b"])
    >>> by_key.keys, by_key.order.tolist(), by_key.starts
    (['b', 'a'], [0, 3, 2], [0, 2, 3])
    """
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            rows.setdefault(key, []).append(row)
    order = torch.tensor([row for chosen in rows.values() for row in chosen], dtype=torch.long)
    return Sorted(list(rows), order, list(accumulate(map(len, rows.values()), initial=0)))


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """A x for hidden states, (rows, tokens, in) to (rows, tokens, r), in the dtype of A."""
    return F.linear(x.to(A.dtype), A)


def look_up(ids: Tensor, A: Tensor) -> Tensor:
    """A x for token ids, which stand for one-hot x: (rows, tokens) to (rows, tokens, r)."""
    return F.embedding(ids, A.T)


def add_segments(
    y: Tensor, x: Tensor, order: Tensor, segments: Sequence[Segment], down: Callable = shrink
) -> Tensor:
    """`y[rows] += s B A x[rows]` for every segment, in place: the readable reference.

    Args:
        y: (rows, tokens, out), the base's output.
        x: (rows, tokens, in), or (rows, tokens) of token ids.
        order: (sorted rows,) the rows of the batch, as the segments count them.
        segments: which of them use what.
        down: `shrink` or `look_up`.

    Returns:
        y.
    """
    for start, stop, (A, B, scaling) in segments:
        rows = order[start:stop]
        z = down(x[rows], A)  # (rows of the segment, tokens, r)
        y[rows] += (scaling * F.linear(z, B)).to(y.dtype)
    return y
