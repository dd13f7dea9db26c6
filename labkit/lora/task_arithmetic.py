"""Arithmetic on updates: the sums that make one update of several, entry by entry.

    linear            sum_i w_i t_i
    magnitude_prune   the same of the largest entries of each t_i
    dare_linear       the same of random entries, divided by the share that is kept
    ties, dare_ties   prune so; per entry elect the sign of the weighted sum; mean of those that have it

A weight counts before the sign is elected, so an update of weight zero has no say, and one of negative weight
votes for the other sign.

Sources: Task Arithmetic (Ilharco et al. 2022), section 2; TIES (Yadav et al. 2023), algorithm 1; DARE (Yu et
al. 2023), section 3. Agrees with: PEFT `utils/merge_utils.py` for equal weights; PEFT elects before it weighs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.checks import check_choice

METHODS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
ELECTIONS = ("total", "frequency")


def add_updates(
    updates: Sequence[Tensor],
    weights: Sequence[float],
    method: str = "linear",
    density: float = 1.0,
    generator: torch.Generator | None = None,
    election: str = "total",
) -> Tensor:
    """One update of several, of one shape.

    Args:
        updates: of one shape.
        weights: one for each.
        method: one of `METHODS`.
        density: the share of entries that pruning keeps, 0 < density <= 1.
        generator: of the random entries of DARE, on the CPU.
        election: of the sign in TIES: by the "total" of the entries, or by their "frequency".

    >>> add_updates([torch.tensor([3.0, 1.0]), torch.tensor([1.0, -2.0])], [1, 1], "ties")
    tensor([ 2., -2.])
    """
    check_choice("method", method, METHODS)
    check_choice("election", election, ELECTIONS)
    if method.startswith("dare"):
        updates = [drop(update, density, generator) for update in updates]
    elif method != "linear":
        updates = [trim(update, density) for update in updates]
    weighted = torch.stack([w * update for w, update in zip(weights, updates, strict=True)])
    if method.endswith("ties"):
        return agreeing_mean(weighted, election)
    return weighted.sum(0)


def trim(update: Tensor, density: float) -> Tensor:
    """The largest entries of `update` by magnitude, a share `density` of them and at least one; zeros elsewhere."""
    kept = max(1, round(density * update.numel()))
    if kept == update.numel():
        return update
    largest = update.abs().flatten().topk(kept).indices
    trimmed = torch.zeros_like(update).flatten()
    trimmed[largest] = update.flatten()[largest]
    return trimmed.view_as(update)


def drop(update: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Each entry with probability `density`, divided by it, which keeps the mean; zeros elsewhere."""
    kept = torch.bernoulli(torch.full(update.shape, density, dtype=torch.float64), generator=generator)
    return update * kept.to(update) / density


def agreeing_mean(weighted: Tensor, election: str = "total") -> Tensor:
    """Per entry, the mean of those of `weighted`, (n, ...), that have the elected sign; 0 if none is elected."""
    votes = weighted if election == "total" else weighted.sign()
    agrees = weighted.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
