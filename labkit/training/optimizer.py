"""The optimizer of a run: which parameters train, at which rate (LoRA+), and whether its state is paged.

Source of LoRA+: Hayou et al. 2024, section 4.
"""

import math
from collections.abc import Mapping

from torch import nn


def parameter_groups(model: nn.Module, lr: float, ratio: float = 1.0) -> list[Mapping]:
    """The parameters of `model` that train, in groups for an optimizer: LoRA+ gives every B the rate `ratio * lr`.

    Groups differ in nothing but `lr` and `lr_ratio`, by which a schedule multiplies; weight decay is the optimizer's for all.
    (PEFT's LoRA+ also gives DoRA's magnitudes and biases B's rate, and embeddings one of their own; this does not.)

    Raises:
        ValueError: ratio is no positive number, or it is not 1 and there is no B.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"lora_plus={ratio!r} must be a positive number; the paper's is 16, and 1 is LoRA")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if ratio == 1:
        return [{"params": list(named.values()), "lr": lr, "lr_ratio": 1.0}]
    split = {1.0: [], ratio: []}
    for name, parameter in named.items():
        split[ratio if name.endswith("lora_B") else 1.0].append(parameter)
    if not split[ratio]:
        raise ValueError(f"lora_plus={ratio!r} is a rate for the B matrices of LoRA, and this model has none")
    return [
        {"params": params, "lr": lr * factor, "lr_ratio": factor}
        for factor, params in split.items()
        if params
    ]
