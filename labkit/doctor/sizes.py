"""How large the steps were, and how large the update is that they made."""

import itertools
import math
import statistics
from collections.abc import Sequence

from labkit.doctor.case import Case, mean_loss
from labkit.doctor.findings import Finding, Missing, healthy, sick
from labkit.lora.low_rank import decompose_product
from labkit.quant.layer_kinds import dense_weight
from labkit.sweeps.valleys import USUAL_SCALING, Valley

STEPS = 12  # from so many on, the loss of their first third and of their last are compared
SURE = 2.0  # standard errors
LAYERS = 24  # that are measured
LARGE, SMALL = 0.5, 2**-9
BITS = 2.0  # that a parameter holds: Allen-Zhu and Li, arXiv 2404.05405


def look_at_rate(case: Case) -> Finding:
    """The effective learning rate beside the swept valley; without one, whether the loss fell at all."""
    losses = case.losses
    peak = max(record["lr"] for record in case.history.steps)
    scaling = (
        statistics.median(layer.scaling for layer in case.layers.values()) if case.layers else USUAL_SCALING
    )
    effective = peak * scaling / USUAL_SCALING
    if case.valley is not None:
        (low, high), which = ends_of(case.valley)
        if effective > high or effective < low:
            by, side = (effective / high, "above") if effective > high else (low / effective, "below")
            return sick(
                f"the effective learning rate, lr times scaling / 2, is {effective:.2g}: {by:.3g} times {side} "
                f"{which}, from {low:.2g} to {high:.2g}",
                by,
                f"train with lr between {low * USUAL_SCALING / scaling:.2g} and {high * USUAL_SCALING / scaling:.2g}",
            )
    if not all(map(math.isfinite, losses)):
        return sick(
            f"the loss became NaN at a rate of {peak:.2g}", math.inf, "lower lr, and clip the gradient at 1.0"
        )
    if len(losses) < STEPS:
        raise Missing(f"{len(losses)} steps are too few to see whether the loss falls")
    third = len(losses) // 3
    before, after = losses[:third], losses[-third:]
    error = ((statistics.variance(before) + statistics.variance(after)) / third) ** 0.5
    fall = statistics.fmean(before) - statistics.fmean(after)
    sure = fall / error if error else math.copysign(math.inf, fall) if fall else 0.0
    if sure < SURE:  # of a short steep run the first third falls so far that its spread hides the fall
        sure = max(sure, kendall(losses))
    if sure < SURE:
        return sick(
            f"the loss did not fall: {fall:+.3g} nats from the first third of the steps to the last",
            sure,
            "sweep lr over a factor of 100 with short runs, and take the valley's lower half",
        )
    if case.valley is None:
        return healthy(
            f"the loss fell by {fall:.2f} nats; no valley was given to compare lr={peak:.2g} with", sure
        )
    return healthy(
        f"the effective learning rate, {effective:.2g}, is in {ends_of(case.valley)[1]}", effective
    )


def kendall(losses: Sequence[float]) -> float:
    """How sure it is that later losses are lower: Kendall's S over its standard error where the order is random.

    Pairs that fall less pairs that rise, whatever by; Mann 1945. A flat loss with noise gives a standard normal.
    """
    n = len(losses)
    pairs = sum((a > b) - (a < b) for a, b in itertools.combinations(losses, 2))
    return pairs / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def ends_of(valley: tuple[float, float] | Valley) -> tuple[tuple[float, float], str]:
    """The ends of a valley, and what it rests on."""
    if isinstance(valley, Valley):
        return (valley.low, valley.high), f"the swept valley ({len(valley.losses)} rates recorded)"
    return (valley[0], valley[1]), "the valley that was given"


def look_at_size(case: Case) -> Finding:
    """The median over layers of rms(dW) / rms(W), how many of the r directions are used, and the capacity."""
    if not case.layers or not case.is_trained:
        raise Missing("there is no trained adapter in the model")
    if case.is_merged:
        raise Missing("the adapter is merged: labkit.unmerge(model) gives back the weight and the update")
    names = list(case.layers)[:: max(1, len(case.layers) // LAYERS)]
    layers = [case.layers[name] for name in names]
    rhos = [(m.delta().norm() / dense_weight(m.base).float().norm()).item() for m in layers]
    if not all(map(math.isfinite, rhos)):
        raise Missing("the update holds NaN or infinity")
    rho = statistics.median(rhos)
    used = statistics.median(directions(m) for m in layers)
    rank = statistics.median(m.r for m in layers)
    scaling = statistics.median(m.scaling for m in layers)
    numbers = {"rho": rho, "directions_used": used, "rank": rank, "scaling": scaling}
    if not SMALL <= rho <= LARGE:
        return sick(
            f"the update is {rho:.2g} times as large as the weight, at a scaling of {scaling:.3g}",
            rho,
            "alpha and lr multiply each other: with alpha = 2 r, lower lr"
            if rho > LARGE
            else "train longer or at a higher lr; merged in bf16, an update of this size is lost",
            **numbers,
        )
    too_small = capacity(case)
    if too_small is not None and too_small > 1:
        return sick(
            f"the data has {too_small:.3g} times the bits that the adapter can hold, and is not learned",
            too_small,
            "raise r, or adapt more layers (all-linear)",
            **numbers,
        )
    return healthy(
        f"the update is {rho:.2g} of the weight, in {used:.1f} of {rank:g} directions", rho, **numbers
    )


def directions(layer) -> float:
    """exp of the entropy of the shares of the singular values of B A: between 1 and r."""
    _, values, _ = decompose_product(layer.lora_A, layer.lora_B)
    shares = values / values.sum().clamp(min=1e-30)
    return math.exp(-(shares * shares.clamp(min=1e-30).log()).sum().item())


def capacity(case: Case) -> float | None:
    """The bits of the training data that the base does not know, by those that the adapter holds.

    None where most of them are learned, whatever the count: what is alike in the records is learned once.
    """
    try:
        before, after = mean_loss(case.heard_base), mean_loss(case.heard)
    except Missing:
        return None
    if after < before / 2:
        return None
    tokens = statistics.fmean(one.n_supervised for one in case.examples) * case.n_records
    held = BITS * sum(m.lora_A.numel() + m.lora_B.numel() for m in case.layers.values())
    return before / math.log(2) * tokens / held
