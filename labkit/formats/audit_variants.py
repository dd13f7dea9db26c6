"""Adapters of every variant, as large as trained ones, for the audit of exports (`labkit.formats.audit`).

Their numbers are random. What an export does to a scale, a name or the order of rows does not depend on them, and an
adapter of this size changes the outputs far more than rounding does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.lora.adapters import add_adapter
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.dora import DoRALinear
from labkit.lora.inject import add_lora
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import Adapter, mounted_adapter
from labkit.models.surgery import untie_embeddings


@dataclass(frozen=True)
class ExportVariant:
    """An adapter to export.

    Attributes:
        config: of it.
        other: of a second one that it is combined with, by "cat"; None for none.
        untied: give the output layer a weight of its own first.
        plain: save it as plain LoRA on the original base (`labkit.save_adapter`).
    """

    config: LoRAConfig
    other: LoRAConfig | None = None
    untied: bool = False
    plain: bool = True


ENDS = ["embed_tokens", "lm_head", "q_proj"]
VARIANTS = {
    "LoRA": ExportVariant(LoRAConfig(r=4, alpha=8)),
    "rsLoRA": ExportVariant(LoRAConfig(r=4, alpha=8, variant="rslora")),
    "DoRA": ExportVariant(LoRAConfig(r=4, alpha=8, variant="dora")),
    "PiSSA": ExportVariant(LoRAConfig(r=4, alpha=4, init="pissa")),
    "PiSSA, as PEFT saves it": ExportVariant(LoRAConfig(r=4, alpha=4, init="pissa"), plain=False),
    "rank and alpha patterns": ExportVariant(
        LoRAConfig(r=4, alpha=8, rank_pattern={"q_proj": 8}, alpha_pattern={"down_proj": 2})
    ),
    "two ranks combined": ExportVariant(LoRAConfig(r=4, alpha=8), LoRAConfig(r=8, alpha=8, targets="mlp")),
    "embeddings, head tied": ExportVariant(LoRAConfig(r=4, alpha=8, targets=ENDS)),
    "embeddings, head untied": ExportVariant(LoRAConfig(r=4, alpha=8, targets=ENDS), untied=True),
    "modules_to_save": ExportVariant(LoRAConfig(r=4, alpha=8, modules_to_save=["lm_head"]), untied=True),
}


def put_on(model: nn.Module, variant: ExportVariant, ratio: float, seed: int) -> nn.Module:
    """Put an adapter of the variant on a base, in place.

    Args:
        model: without adapters; its embeddings are untied if the variant wants it.
        variant: of the adapter.
        ratio: the size of each layer's correction: its rms by that of the weight.
        seed: of its numbers.

    Returns:
        `model`, in eval mode.

    Raises:
        ValueError: labkit refuses the adapter on this model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora(model, variant.config)
        enlarge(mounted_adapter(model), ratio, generator)
        if variant.other is not None:
            add_adapter(model, "other", variant.other)
            enlarge(mounted_adapter(model), ratio, generator)
            combine(model, {"default": 1.0, "other": 0.5}, "both")
    return model.eval()


def base_of(model: nn.Module, variant: ExportVariant) -> nn.Module:
    """The base that the variant goes on, in place: with an output layer of its own, if it needs one."""
    return untie_embeddings(model) if variant.untied else model


@torch.no_grad()
def enlarge(adapter: Adapter, ratio: float, generator: torch.Generator) -> None:
    """Change a fresh adapter as a training would, by a change of `ratio` times the weights."""
    for module in adapter.modules.values():
        if isinstance(module, LoRALinear):
            enlarge_layer(module, ratio, generator)
        else:
            for parameter in module.parameters():
                parameter.mul_(1 + ratio * noise(parameter, generator))


def enlarge_layer(layer: LoRALinear, ratio: float, generator: torch.Generator) -> None:
    """Change one factor of a layer, that which starts at zero if one does, and DoRA's magnitudes."""
    A, B = layer.lora_A, layer.lora_B
    factor = B if A.any() else A  # of an embedding, A starts at zero
    step = noise(factor, generator)
    change = layer.scaling * (step @ A if factor is B else B @ step)
    factor.add_(ratio * rms(layer.base.weight) / rms(change) * step)
    if isinstance(layer, DoRALinear):
        layer.lora_magnitude.mul_(1 + ratio * noise(layer.lora_magnitude, generator))


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
