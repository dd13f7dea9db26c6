"""The numbers of `labkit.analysis.spectra` for a whole run: each over all layers, beside its control.

A figure of one layer of one run is an anecdote. These are means (or medians, if one layer may be far off)
over all linear layers, so a sweep can record them for several seeds:

                numbers                                                       control
    spectrum    effective, stable and 90 % energy rank, as shares of full     noise of the same norm
    agreement   phi(1, 1) and phi(8, 8) with a run from another seed          random directions
    size        |dW| / |W|, and amplification                                 random directions
    intruders   new ones among the top 10 directions of the tuned weights     noise of the same norm
    effect      share of the gain kept by the k largest directions            k random ones; half of dW

Sources: see `labkit.analysis.spectra`.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from labkit.analysis import spectra
from labkit.analysis.spectra import SVD
from labkit.analysis.updates import find_updates, frozen_weight, linear_layers, with_update

TOP = 10  # directions among which intruders are counted, as in arXiv 2410.21228
INTRUDER_COSINE = 0.6
KEPT = (1, 4, 16, 64)  # directions of each matrix whose effect is measured


def spectral_numbers(base: nn.Module, tuned: nn.Module, twin: nn.Module, seed: int = 0) -> dict[str, float]:
    """Spectrum, agreement, size and intruders of the updates of `tuned`, each beside its control.

    Args:
        base: the model before training.
        tuned: after it; see `labkit.analysis.updates.find_updates`.
        twin: a second run like `tuned`, from another seed.
        seed: of the controls.

    Returns:
        {name: number}, each over the layers that both runs changed. A name that ends in `_control` is the
        control.

    Raises:
        ValueError: see `labkit.analysis.updates.find_updates`, or nothing was trained.
    """
    weights = {name: frozen_weight(layer) for name, layer in linear_layers(base).items()}
    first = {name: spectra.svd(update) for name, update in find_updates(base, tuned).items()}
    second = {name: spectra.svd(update) for name, update in find_updates(base, twin).items()}
    dense = {name: spectra.truncate(parts, len(parts.s)) for name, parts in first.items()}
    noise = {name: spectra.gaussian_like(dense[name], seed + i) for i, name in enumerate(first)}
    noise_svd = {name: spectra.svd(matrix) for name, matrix in noise.items()}
    turned = {name: in_random_directions(parts, seed + i) for i, (name, parts) in enumerate(first.items())}
    return (
        ranks(first, "")
        | ranks(noise_svd, "_control")
        | agreement(first, second, "")
        | agreement(turned, second, "_control")
        | {
            "relative_norm": median(first[name].s.norm() / weights[name].norm() for name in first),
            "amplification": median(spectra.amplification(first[name], weights[name], 8) for name in first),
            "amplification_control": median(
                spectra.amplification(turned[name], weights[name], 8) for name in first
            ),
        }
        | intruders(weights, dense, noise)
    )


def ranks(parts: Mapping[str, SVD], suffix: str) -> dict[str, float]:
    """Three ranks, each as a mean share of the rank that the matrix could have."""
    measures = {
        "effective": spectra.effective_rank,
        "stable": spectra.stable_rank,
        "energy90": spectra.energy_rank,
    }
    return {
        f"{name}{suffix}": statistics.fmean(measure(one.s) / len(one.s) for one in parts.values())
        for name, measure in measures.items()
    }


def agreement(first: Mapping[str, SVD], second: Mapping[str, SVD], suffix: str) -> dict[str, float]:
    """phi(1, 1) and phi(8, 8), or phi(r, r) below rank 8, of the input and output directions of two runs;
    mean over layers.
    """
    found = {}
    for side, directions in (("in", lambda one: one.Vh.T), ("out", lambda one: one.U)):
        tables = [
            spectra.subspace_similarity(directions(first[name])[:, :8], directions(second[name])[:, :8])
            for name in first
        ]
        found[f"phi1_{side}{suffix}"] = statistics.fmean(table[0, 0].item() for table in tables)
        found[f"phi8_{side}{suffix}"] = statistics.fmean(table[-1, -1].item() for table in tables)
    return found


def intruders(
    weights: Mapping[str, Tensor], dense: Mapping[str, Tensor], noise: Mapping[str, Tensor]
) -> dict[str, float]:
    """Intruders among the top directions of all tuned weights, and of the base plus noise of equal norm."""
    found: dict[str, float] = {"intruders": 0, "intruders_control": 0}
    for name in dense:
        before = spectra.svd(weights[name])
        for key, change in (("intruders", dense[name]), ("intruders_control", noise[name])):
            after = spectra.svd(weights[name] + change)
            found[key] += len(spectra.intruder_dimensions(before, after, TOP, INTRUDER_COSINE))
    return found


def effect_numbers(
    base: nn.Module, updates: Mapping[str, Tensor], loss: Callable[[nn.Module], float], seed: int = 0
) -> dict[str, float]:
    """How much of what `updates` do for the loss is left when only a part of them is applied.

    Args:
        base: the model before training, with plain weights.
        updates: {layer: (out, in)}, what training changed.
        loss: of a model, on text that was not trained on.
        seed: of the random directions.

    Returns:
        {name: share of the improvement}: `kept_k` by the k largest directions, `kept_k_control` by k random
        ones, `kept_half` by the whole update at half its size.

    Raises:
        ValueError: the updates do not lower the loss, so there is nothing to share.
    """

    def loss_with(changes: Mapping[str, Tensor]) -> float:
        with with_update(base, changes) as model:
            return loss(model)

    before, after = loss(base), loss_with(updates)
    if after >= before:
        raise ValueError(
            f"the updates do not lower the loss ({before:.4f} to {after:.4f}); nothing was learned"
        )
    parts = {name: spectra.svd(update) for name, update in updates.items()}
    changes = {"kept_half": {name: update / 2 for name, update in updates.items()}}
    for k in KEPT:
        changes[f"kept_{k}"] = {name: spectra.truncate(one, k) for name, one in parts.items()}
        changes[f"kept_{k}_control"] = {
            name: spectra.random_directions(update, k, seed) for name, update in updates.items()
        }
    return {name: (before - loss_with(change)) / (before - after) for name, change in changes.items()}


def in_random_directions(parts: SVD, seed: int) -> SVD:
    """The same singular values in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def directions(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, len(parts.s), dtype=torch.float32, generator=generator)).Q

    return SVD(directions(len(parts.U)), parts.s, directions(parts.Vh.shape[1]).T)


def median(values: Iterable[Tensor | float]) -> float:
    return statistics.median(float(value) for value in values)
