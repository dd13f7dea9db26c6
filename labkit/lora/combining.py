"""The weighted sum of adapters as one more adapter: exact by concatenation, or of one rank and approximate.

"cat" is exact: w1 s1 B1 A1 + w2 s2 B2 A2 = [w1 s1 B1, w2 s2 B2] [A1; A2], of rank r1 + r2. "linear" adds the
factors instead, which keeps the rank and adds the cross terms B1 A2 and B2 A1, which nobody has trained.

Agrees with: PEFT `add_weighted_adapter`, combination types "cat" and "linear".
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from labkit.checks import check_choice
from labkit.lora.adapters import check_known, check_new
from labkit.lora.config import LoRAConfig
from labkit.lora.mounting import Adapter, Place, adapters_of, attach

COMBINATIONS = ("cat", "linear")


def combine(model: nn.Module, weights: Mapping[str, float], name: str, how: str = "cat") -> nn.Module:
    """Make the adapter `name`, the weighted sum of others, and mount it; the others stay as they are.

    Args:
        model: with the adapters; changed in place.
        weights: a weight for each of them, by name; it may be negative.
        name: of the new adapter.
        how: "cat", exact, with the sum of the ranks; or "linear", of one rank, an approximation.

    Returns:
        `model`.

    Raises:
        ValueError: the name is taken or an adapter is not there, is not plain LoRA, trains modules in full,
            or (for "linear") has another rank than the others.
    """
    check_choice("how", how, COMBINATIONS)
    check_new(model, name)
    check_known(model, weights)
    if not weights:
        raise ValueError(
            "weights is empty; give a weight for each adapter, such as {'poet': 0.7, 'clerk': 0.3}"
        )
    parts = {n: adapters_of(model).by_name[n] for n in weights}
    layers_of = {n: part.layers for n, part in parts.items()}
    for n, part in parts.items():
        changed_base = any(layer.has_own_base for layer in layers_of[n].values())
        if part.config.is_dora or changed_base or len(layers_of[n]) < len(part.modules):
            raise ValueError(
                f"{n!r} is more than a correction s B A that could be added to others (DoRA, a changed "
                "base, or modules that train in full)"
            )
    base = {path: module for part in parts.values() for path, module in part.base_modules().items()}
    modules = {}
    for path in base:
        layers = {n: own[path] for n, own in layers_of.items() if path in own}
        device = Place.of(base[path]).device  # adapters that are put away may be on another
        factors = [
            (weights[n] * layer.scaling, layer.lora_A.detach().to(device), layer.lora_B.detach().to(device))
            for n, layer in layers.items()
        ]
        if how == "cat":
            A = torch.cat([A for _, A, _ in factors])  # (r1 + r2 + …, in)
            B = torch.cat([w * B for w, _, B in factors], dim=1)  # (out, r1 + r2 + …)
        elif len({len(A) for _, A, _ in factors}) > 1:
            raise ValueError(
                f"how='linear' adds factors of one rank, and those of {path} have several; use how='cat'"
            )
        else:  # the sign of a weight goes to one factor only
            A = sum(math.copysign(math.sqrt(abs(w)), w) * A for w, A, _ in factors)
            B = sum(math.sqrt(abs(w)) * B for w, _, B in factors)
        first = next(iter(layers.values()))
        layer = type(first)(base[path], LoRAConfig(r=len(A), alpha=len(A)))  # scaling 1: it is in the factors
        layer.lora_A.data, layer.lora_B.data = A, B
        modules[path] = layer.train(first.training)
    ranks = {path: layer.r for path, layer in modules.items()}
    r = max(ranks.values())
    others = {exact_pattern(path): rank for path, rank in ranks.items() if rank != r}
    config = LoRAConfig(r, r, targets=list(base), rank_pattern=others, alpha_pattern=others)
    attach(model, name, Adapter(config, modules, {}))
    return model


def exact_pattern(name: str) -> str:
    """A pattern that means the module `name` and no other."""
    return "^" + name.replace(".", r"\.")
