"""QLoRA: an adapter over a base in 4 bits, added in the order that the adapter's start asks for."""

from dataclasses import replace
from typing import Any

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import fingerprint
from labkit.lora.inject import add_lora
from labkit.lora.mounting import mounted_adapter
from labkit.lora.starts import LOFTQ_ITERATIONS, loftq
from labkit.lora.targets import saved_names
from labkit.models.surgery import inside
from labkit.quant.config import QuantConfig
from labkit.quant.model import quantizable_layers, quantize_model


def add_qlora(
    model: nn.Module,
    config: LoRAConfig,
    progress: bool = False,
    quantization: QuantConfig | None = None,
    name: str = "default",
    **settings: Any,
) -> nn.Module:
    """Put `model` in 4 bits and an adapter on it, in the order that the adapter's start asks for.

    Random starts: quantize, then add. PiSSA and OLoRA: split the weights, then quantize the rest. LoftQ: both
    in turns. All but the random starts do not keep the original weights, so such an adapter cannot be taken
    out or put beside others.

    Args:
        model: in full precision.
        config: see `labkit.LoRAConfig`.
        progress: see `labkit.quantize_model`.
        quantization, settings: a `labkit.QuantConfig`, or its values by name.
        name: of the adapter.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: see `add_lora` and `quantize_model`.
    """
    quantization = QuantConfig.of(quantization, **settings)
    skip = [n for n in plain_linears(model) if inside(n, config.modules_to_save)]
    if not config.starts_from_weight:
        quantize_model(model, quantization, skip=tuple(skip), progress=progress)
        return add_lora(model, config, name)
    replaced = saved_names(model, config.modules_to_save)
    start = {"origin": fingerprint(model, replaced), "quantization": settings or quantization.changes()}
    add_lora(model, replace(config, init="default") if config.is_loftq else config, name)
    adapter = mounted_adapter(model)
    adapter.config, adapter.originals, adapter.start = config, None, start
    if config.is_loftq:
        for layer in adapter.layers.values():
            loftq(layer, config.start_iterations or LOFTQ_ITERATIONS, quantization)
    train = [p for p in model.parameters() if p.requires_grad]
    if set(plain_linears(model)) - set(skip):
        quantize_model(model, quantization, skip=tuple(skip), progress=progress)
    for parameter in train:
        parameter.requires_grad_(True)
    return model


def plain_linears(model: nn.Module) -> list[str]:
    """Own names of the linear layers that `quantize_model` would quantize."""
    return [layer.name for layer in quantizable_layers(model)]
