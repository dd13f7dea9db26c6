"""The optimizer of a run: which parameters train, at which rate (LoRA+), and whether its state is paged.

Source of LoRA+: Hayou et al. 2024, section 4.
"""

from collections.abc import Mapping

import torch
from torch import nn

from labkit.checks import check_positive
from labkit.optim.adamw import AdamW8bit
from labkit.optim.paging import attach_paging

OPTIMIZERS = ("adamw", "adamw8bit")


def parameter_groups(model: nn.Module, lr: float, ratio: float = 1.0) -> list[Mapping]:
    """The parameters of `model` that train, in groups for an optimizer: LoRA+ gives every B the rate `ratio *
    lr`.

    Groups differ only in `lr` and in `lr_ratio`, by which a schedule multiplies; weight decay is the
    optimizer's for all. (PEFT's LoRA+ also gives DoRA's magnitudes and biases B's rate, and embeddings a rate
    of their own; this does not.)

    Raises:
        ValueError: ratio is not a positive number, or it is not 1 and there is no B.
    """
    check_positive("lora_plus", ratio, usual="the paper's is 16, and 1 is LoRA")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if ratio == 1:
        return [{"params": list(named.values()), "lr": lr, "lr_ratio": 1.0}]
    split: dict[float, list[nn.Parameter]] = {1.0: [], ratio: []}
    for name, parameter in named.items():
        split[ratio if name.endswith("lora_B") else 1.0].append(parameter)
    if not split[ratio]:
        raise ValueError(f"lora_plus={ratio!r} is a rate for the B matrices of LoRA, and this model has none")
    return [
        {"params": params, "lr": lr * factor, "lr_ratio": factor}
        for factor, params in split.items()
        if params
    ]


def make_optimizer(
    name: str, parameters: list, state_budget_bytes: int | None, **adam
) -> torch.optim.Optimizer:
    """The optimizer of a training run, paged if there is a budget.

    Args:
        name: one of `OPTIMIZERS`. "adamw" is PyTorch's fused one: a single pass over an adapter's several
            hundred small tensors instead of a dozen passes over each.
        parameters: what trains, or groups of it.
        state_budget_bytes: see `attach_paging`; None for no paging.
        adam: lr (unless the groups have one), betas, eps, weight_decay.
    """
    optimizer = (
        AdamW8bit(parameters, **adam)
        if name == "adamw8bit"
        else torch.optim.AdamW(parameters, **adam, fused=True)
    )
    if state_budget_bytes is not None:
        attach_paging(optimizer, state_budget_bytes)
    return optimizer
