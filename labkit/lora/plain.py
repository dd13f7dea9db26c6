"""A PiSSA or OLoRA adapter as plain LoRA on the base as it was, which any stack can load, serve and combine.

W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]          B0, A0: where B and A started
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from labkit.lora.adapters import base_only
from labkit.lora.config import LoRAConfig
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import mounted_adapter


def plain_factors(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """A and B of the adapter as plain LoRA on the original weight, of rank 2r; its own if it is plain."""
    if not layer.has_own_base:
        return layer.lora_A.detach(), layer.lora_B.detach()
    A = torch.cat([layer.lora_A.detach(), layer.start_A])  # (2r, in)
    B = torch.cat([layer.lora_B.detach(), -layer.start_B], dim=1)  # (out, 2r)
    return A, B


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """The config of `plain_factors`: twice the rank, and the same scaling."""
    if not config.starts_from_weight:
        return config
    wider = math.sqrt(2) if config.is_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        alpha=config.alpha * wider,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: alpha * wider for key, alpha in config.alpha_pattern.items()},
        init="default",
    )


def to_plain_lora(model: nn.Module) -> nn.Module:
    """Turn the mounted adapter, PiSSA or OLoRA, into LoRA of rank 2r on the base model as it was; in place.

    The outputs stay the same, but for rounding; the adapter can then be combined with others and served
    beside them.

    Returns:
        `model`.

    Raises:
        ValueError: no adapter of this kind, it is merged, or (`add_qlora`) the original weights are gone.
    """
    adapter = mounted_adapter(model)
    if adapter is None or not adapter.config.starts_from_weight:
        raise ValueError("to_plain_lora takes a model with a PiSSA or OLoRA adapter mounted")
    if adapter.is_merged or not adapter.keeps_base:
        raise ValueError(
            "the original weights are not at hand: unmerge the adapter first; if add_qlora made it, save it "
            "and load it onto the full-precision base"
        )
    config = plain_config(adapter.config)
    with base_only(model):
        for name, old in adapter.layers.items():
            new = LoRALinear(adapter.originals.pop(name), config.for_layer(name))
            new.lora_A.data, new.lora_B.data = plain_factors(old)
            adapter.modules[name] = new
        adapter.config = config
    return model
