"""The valley of learning rates in a recorded sweep: those that are about as good as the best.

A rate counts as good if its loss, averaged over seeds, is within 1 % of the lowest. The valley reaches from halfway (in
the logarithm) between the lowest good rate and the next lower one, to halfway above the highest. Without a worse rate
on both sides nobody knows where it ends, and then there is none: an optimum at the edge of what was tried is none.

Rates are given as for alpha = 2 r. The update is scaling times B A, so a rate at another scaling counts as lr times
scaling / 2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev

from labkit.sweeps.config import RunConfig
from labkit.sweeps.records import Results, load_recorded

GOOD = 0.01  # of the lowest loss
USUAL_SCALING = 2.0

# base, method and task: the experiment that swept their rate, and which of its runs
SWEEPS: dict[tuple[str, str, str], tuple[str, dict]] = {
    ("tiny-llama", "lora", "austen"): ("rank", {"r": 8}),
    ("tiny-llama", "full", "austen"): ("full", {"method": "full", "embeddings": None}),
    ("smollm2-135m", "qlora", "tickets"): ("tickets_rates", {}),
}


@dataclass(frozen=True)
class Valley:
    """The learning rates that a sweep found good.

    Attributes:
        low, high: its ends, for alpha = 2 r.
        best: the rate with the lowest mean loss.
        losses: {rate: mean loss over seeds}, of all that were tried; infinite where a run diverged.
        seeds: how many there are, at the best rate.
    """

    low: float
    high: float
    best: float
    losses: dict[float, float]
    seeds: int


def recorded_valley(task: str, model: str, method: str) -> Valley | None:
    """The valley of a task in the sweeps that come with the course; None if no sweep of it has one."""
    if (model, method, task) not in SWEEPS:
        return None
    name, settings = SWEEPS[model, method, task]
    return valley_of(load_recorded(name), **settings)


def valley_of(results: Results, metric: str = "validation_loss", **settings) -> Valley | None:
    """The valley in recorded runs that differ in nothing but `lr` and `seed`.

    Args:
        results: of a sweep, as `labkit.sweeps.records.load` reads them.
        metric: the loss that decides.
        settings: that a run must have to be counted, such as r=8.

    Returns:
        None if the best rate, or a good one, is at the edge of what was tried.

    Raises:
        ValueError: no run has these settings, or the runs that have them differ in more.
    """
    runs = [
        (config, record)
        for config, record in results.by_config().items()
        if all(getattr(config, name) == value for name, value in settings.items())
    ]
    if not runs:
        raise ValueError(f"no recorded run has {settings}")
    others = [f.name for f in fields(RunConfig) if f.name not in ("lr", "seed")]
    differ = [name for name in others if len({getattr(config, name) for config, _ in runs}) > 1]
    if differ:
        raise ValueError(f"these runs differ in {', '.join(differ)} too: say which are meant, as in r=8")
    found: dict[float, list[float]] = {}
    for config, record in runs:
        rate = config.lr * scaling_of(config) / USUAL_SCALING
        found.setdefault(rate, []).append(record.get("metrics", {}).get(metric, math.inf))
    return valley_between(found)


def valley_between(found: Mapping[float, Sequence[float]], errors: float = 0.0) -> Valley | None:
    """The valley in the losses of several rates.

    Args:
        found: {rate: its losses, one per seed, in one order of seeds}; infinite where a run diverged.
        errors: a rate counts as good, too, if its mean is above the lowest by less than so many standard errors of the
            difference, seed by seed. Short runs, whose seeds differ by more than 1 %, need 2.

    Returns:
        None if the best rate, or a good one, is at the edge of what was tried.
    """
    losses = {rate: fmean(found[rate]) for rate in sorted(found)}
    best = min(losses, key=losses.__getitem__)

    def is_good(rate: float) -> bool:
        if losses[rate] <= losses[best] * (1 + GOOD):
            return True
        above = [mine - lowest for mine, lowest in zip(found[rate], found[best])]
        if not errors or not math.isfinite(fmean(above)) or len(above) < 2:
            return False
        return fmean(above) < errors * stdev(above) / math.sqrt(len(above))

    rates = list(losses)
    first = last = rates.index(best)
    while first > 0 and is_good(rates[first]):
        first -= 1
    while last < len(rates) - 1 and is_good(rates[last]):
        last += 1
    if any(is_good(rates[end]) for end in (first, last)):
        return None
    low, high = (
        math.sqrt(rates[end] * rates[next_one]) for end, next_one in ((first, first + 1), (last, last - 1))
    )
    return Valley(low, high, best, losses, len(found[best]))


def scaling_of(config: RunConfig) -> float:
    """What multiplies B A in a run; the usual one where it has no adapter."""
    return config.lora_config().scaling if config.method in ("lora", "qlora") else USUAL_SCALING
