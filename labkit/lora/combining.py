"""Adapters combined into one more adapter: exactly by concatenation, or of low rank and approximately.

    cat      [w1 s1 B1, w2 s2 B2] [A1; A2]      exact, of rank r1 + r2
    svd      the best approximation of that sum of rank r
    linear   the factors are added, which adds the cross terms B1 A2 and B2 A1, that nobody has trained

The methods of `labkit.lora.task_arithmetic` work on the factors, A and B apart, which is cheap and has the
cross terms too; or with `_svd` at the end on the corrections s B A themselves, of which the SVD then keeps
rank r.

Agrees with: PEFT `add_weighted_adapter` for plain LoRA. `tests/lora/test_combining_disputed.py` has the cases
where the two differ.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from labkit.checks import check_choice, is_number, is_whole
from labkit.lora.adapters import check_known, check_new
from labkit.lora.config import LoRAConfig
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.lora.low_rank import check_rank, decompose, decompose_product, rank_for, truncate
from labkit.lora.mounting import Adapter, Place, adapters_of, attach, mounted_adapter
from labkit.lora.plain import plain_factors
from labkit.lora.sums import check_factors
from labkit.lora.task_arithmetic import ELECTIONS, METHODS, add_updates

ON_FACTORS = METHODS
ON_UPDATES = ("svd", *(f"{method}_svd" for method in METHODS if method != "linear"))
COMBINATIONS = ("cat", *ON_FACTORS, *ON_UPDATES)


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    how: str = "cat",
    *,
    r: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    election: str = "total",
) -> nn.Module:
    """Make the adapter `name`, the weighted sum of others, and mount it; the others stay as they are.

    Args:
        model: with the adapters; changed in place.
        weights: a weight for each of them, by name; it may be negative.
        name: of the new adapter.
        how: one of `COMBINATIONS`: "cat", exact, with the sum of the ranks; "svd", of rank r; "linear",
            "magnitude_prune", "ties", "dare_linear" or "dare_ties" on the factors, which must have one rank;
            or one of the last four with "_svd" on the corrections, of any ranks and variants.
        r: for "svd" and its like, the highest rank; the largest of the adapters' by default.
        energy: for "svd" and its like, the share of the squared sum to keep, instead of a rank or below it.
        density: the share of entries that pruning keeps, 0 < density <= 1; needed where there is pruning.
        seed: of the entries that DARE keeps.
        election: of the sign in TIES: by "total" or "frequency".

    Returns:
        `model`.

    Raises:
        ValueError: the name is taken; an adapter is not there, is merged, or is not of a form that `how` can
            add, or holds NaN; the weights sum to zero; or the value of a setting is not allowed. Nothing is changed then.
    """
    check_choice("how", how, COMBINATIONS)
    check_new(model, name)
    check_known(model, weights)
    check_weights(weights)
    check_settings(how, r, energy, density, seed, election)
    mounted = mounted_adapter(model)
    if mounted is not None and mounted.is_merged:
        raise ValueError(
            f"the adapter {adapters_of(model).active!r} is merged into the base; unmerge it first"
        )
    parts = {n: adapters_of(model).by_name[n] for n in weights}
    for n, part in parts.items():
        check_form(n, part, how)
        check_factors(part.layers)
    base = {path: module for part in parts.values() for path, module in part.base_modules().items()}
    generator = torch.Generator().manual_seed(seed)
    settings = {"density": density or 1.0, "generator": generator, "election": election}
    modules = {}
    for path in base:
        layers = {n: part.layers[path] for n, part in parts.items() if path in part.layers}
        device = Place.of(base[path]).device  # adapters that are put away may be on another
        if how in ON_UPDATES:
            A, B = of_updates(layers, weights, how, r, energy, settings)
        else:
            A, B = of_factors(path, layers, weights, how, device, settings)
        kind = LoRAEmbedding if isinstance(base[path], nn.Embedding) else LoRALinear
        layer = kind(base[path], LoRAConfig(r=len(A), alpha=len(A)))  # scaling 1: it is in the factors
        layer.lora_A.data, layer.lora_B.data = A.to(layer.lora_A), B.to(layer.lora_B)
        modules[path] = layer.train(next(iter(layers.values())).training)
    attach(model, name, Adapter(config_of(modules), modules, {}))
    return model


def of_factors(
    path: str,
    layers: Mapping[str, LoRALinear],
    weights: Mapping[str, float],
    how: str,
    device: torch.device | None,
    settings: dict,
) -> tuple[Tensor, Tensor]:
    """A and B of the sum, made of the factors of one layer in each adapter."""
    factors = [(weights[n] * layer.scaling, *factors_of(layer, device)) for n, layer in layers.items()]
    if how == "cat":
        A = torch.cat([A for _, A, _ in factors])  # (r1 + r2 + …, in)
        return A, torch.cat([w * B for w, _, B in factors], dim=1)  # (out, r1 + r2 + …)
    if len({len(A) for _, A, _ in factors}) > 1:
        raise ValueError(
            f"how={how!r} adds factors of one rank, and those of {path} have several; use how='cat', or "
            f"how={'svd' if how == 'linear' else how + '_svd'!r}, which adds the corrections themselves"
        )
    roots = [math.sqrt(abs(w)) for w, _, _ in factors]
    signed = [
        math.copysign(root, w) for root, (w, _, _) in zip(roots, factors)
    ]  # the sign on one factor only
    if how == "linear":
        A = sum(root * A for root, (_, A, _) in zip(signed, factors))
        return A, sum(root * B for root, (_, _, B) in zip(roots, factors))
    A = add_updates([A for _, A, _ in factors], signed, how, **settings)
    return A, add_updates([B for _, _, B in factors], roots, how, **settings)


@torch.no_grad()
def of_updates(
    layers: Mapping[str, LoRALinear],
    weights: Mapping[str, float],
    how: str,
    r: int | None,
    energy: float | None,
    settings: dict,
) -> tuple[Tensor, Tensor]:
    """A and B of low rank, of the combined corrections of one layer in each adapter."""
    if r is None and energy is None:
        r = max(len(factors_of(layer)[0]) for layer in layers.values())
    if how == "svd" and not any(is_dora(layer) for layer in layers.values()):
        pairs = [(weights[n] * layer.scaling, *factors_of(layer)) for n, layer in layers.items()]
        A = torch.cat([A.double().cpu() for _, A, _ in pairs])
        parts = decompose_product(A, torch.cat([w * B.double().cpu() for w, _, B in pairs], dim=1))
    else:
        updates = [update_of(layer) for layer in layers.values()]
        method = "linear" if how == "svd" else how.removesuffix("_svd")
        parts = decompose(add_updates(updates, [weights[n] for n in layers], method, **settings))
    return truncate(parts, rank_for(parts[1], r, energy))


def factors_of(layer: LoRALinear, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """A and B of the correction of the model's own weight: of PiSSA and its like, as plain LoRA of rank 2r."""
    A, B = plain_factors(layer)
    return A.to(device or A.device), B.to(device or B.device)


def update_of(layer: LoRALinear) -> Tensor:
    """What the adapter changes in the model's own weight, (out, in), in float64 on the CPU."""
    if is_dora(layer):
        return layer.delta().double().cpu()
    A, B = factors_of(layer)
    return (layer.scaling * (B.double() @ A.double())).cpu()


def is_dora(layer: LoRALinear) -> bool:
    """Is the correction not s B A, as it stretches the rows of the whole weight?"""
    return hasattr(layer, "lora_magnitude")


def config_of(modules: Mapping[str, LoRALinear]) -> LoRAConfig:
    """The config of an adapter of these layers, of scaling 1 and several ranks."""
    ranks = {path: layer.r for path, layer in modules.items()}
    r = max(ranks.values())
    others = {exact_pattern(path): rank for path, rank in ranks.items() if rank != r}
    return LoRAConfig(r, r, targets=list(modules), rank_pattern=others, alpha_pattern=others)


def exact_pattern(name: str) -> str:
    """A pattern that means the module `name` and no other."""
    return "^" + name.replace(".", r"\.")


def check_form(name: str, part: Adapter, how: str) -> None:
    """Raise a `ValueError` unless `how` can add the adapter `part`, called `name`, to others."""
    in_full = [path for path in part.modules if path not in part.layers]
    if in_full:
        why = (
            f"it trains {in_full[0]} in full, and modules of several adapters have no sum. Train it without "
            "modules_to_save, or switch between the adapters with use_adapter"
        )
    elif part.config.is_dora and how not in ON_UPDATES:
        why = (
            "DoRA stretches the rows of the whole weight, so its change is of full rank. how='svd' (or another "
            "with '_svd') combines the changes themselves and keeps rank r of them"
        )
    elif not part.keeps_base:
        why = (
            "it came with a changed base in 4 bits, whose weights from before were not kept. Load the adapter onto "
            "the full-precision base with load_adapter, and combine there"
        )
    else:
        return
    raise ValueError(f"{name!r} is more than a correction s B A that could be added to others: {why}")


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise a `ValueError` unless the weights are finite numbers that do not sum to zero."""
    if not weights:
        raise ValueError(
            "weights is empty; give a weight for each adapter, such as {'poet': 0.7, 'clerk': 0.3}"
        )
    for name, weight in weights.items():
        if not is_number(weight) or math.isinf(weight):
            raise ValueError(f"weights[{name!r}]={weight!r} must be a finite number, such as 0.7")
    if abs(math.fsum(weights.values())) <= 1e-9 * max(abs(w) for w in weights.values()):
        raise ValueError(
            f"the weights {dict(weights)} sum to zero: what the adapters have in common would cancel. Give weights "
            "with another sum; to take part of one adapter out of another, such as {'poet': 1, 'clerk': -0.5}"
        )


def check_settings(how: str, r: object, energy: object, density: object, seed: object, election: str) -> None:
    """Raise a `ValueError` unless the settings are allowed, and mean something for `how`."""
    check_rank(r, energy)
    check_choice("election", election, ELECTIONS)
    if not is_whole(seed, at_least=0):
        raise ValueError(f"seed={seed!r} must be a whole number of at least 0")
    if how not in ON_UPDATES and (r is not None or energy is not None):
        raise ValueError(f"how={how!r} has the rank of its factors; leave out r and energy, or use how='svd'")
    prunes = how not in ("cat", "linear", "svd")
    if prunes and density is None:
        raise ValueError(f"how={how!r} prunes: give density, the share of entries to keep, such as 0.5")
    if not prunes and density is not None:
        raise ValueError(f"how={how!r} prunes nothing; leave out density, or use how='ties'")
    if density is not None and (not is_number(density) or not 0 < density <= 1):
        raise ValueError(
            f"density={density!r} must be a number above 0 and at most 1, the share that is kept"
        )
