"""Collectives on a ring: what a rank sends is only ever its neighbour's next piece.

N ranks stand in a circle. A tensor of n numbers is cut into N pieces.

    reduce-scatter   N - 1 times: pass a piece on, add what comes in      then each rank has one piece of the sum
    all-gather       N - 1 times: pass a piece on, keep what comes in     then each has all N pieces
    all-reduce       the one, then the other:  2 (N - 1) / N · n numbers leave each rank

Why a ring: a rank that adds for all would pass 2 (N - 1) n numbers through its one link. On a ring no link carries
2 n, however many ranks there are.

Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms". Agrees with: gloo, to the bit for two
ranks; with more, the terms of a sum are added in another order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# sends the first tensor to the next rank on the ring, and fills the second with what the previous one sends
Exchange = Callable[[Tensor, Tensor], None]

ADD = {
    "SUM": Tensor.add_,
    "AVG": Tensor.add_,
    "PRODUCT": Tensor.mul_,
    "MAX": lambda mine, other: torch.maximum(mine, other, out=mine),
    "MIN": lambda mine, other: torch.minimum(mine, other, out=mine),
}


def reduce_scatter(pieces: Sequence[Tensor], rank: int, exchange: Exchange, op: str = "SUM") -> None:
    """Reduce in place, so that `pieces[rank]` is that of all ranks; the other pieces hold partial results.

    Args:
        pieces: N contiguous tensors; piece i has the same shape on every rank.
        rank: this one.
        exchange: with the neighbours.
        op: one of `ADD`.
    """
    ranks = len(pieces)
    for hop in range(ranks - 1):
        give, take = pieces[(rank - hop - 1) % ranks], pieces[(rank - hop - 2) % ranks]
        incoming = torch.empty_like(take)
        exchange(give, incoming)
        ADD[op](take, incoming)
    if op == "AVG":
        pieces[rank].div_(ranks)


def all_gather(pieces: Sequence[Tensor], rank: int, exchange: Exchange) -> None:
    """Fill all pieces, of which `pieces[rank]` is this rank's own."""
    ranks = len(pieces)
    for hop in range(ranks - 1):
        exchange(pieces[(rank - hop) % ranks], pieces[(rank - hop - 1) % ranks])


def all_reduce(tensor: Tensor, rank: int, ranks: int, exchange: Exchange, op: str = "SUM") -> None:
    """Reduce a contiguous tensor over all ranks, in place."""
    pieces = tensor.view(-1).tensor_split(ranks)
    reduce_scatter(pieces, rank, exchange, op)
    all_gather(pieces, rank, exchange)
