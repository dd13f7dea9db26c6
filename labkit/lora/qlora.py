"""QLoRA: an adapter over a base in 4 bits, added in the order that the adapter's start asks for."""

from dataclasses import replace
from typing import Any

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import fingerprint
from labkit.lora.inject import add_lora, check_arguments, places_for
from labkit.lora.mounting import check_name, mounted_adapter, refuse_adapted
from labkit.lora.starts import LOFTQ_ITERATIONS, loftq
from labkit.models.surgery import inside
from labkit.quant.config import QuantConfig
from labkit.quant.model import check_before, quantizable_layers, quantize_model


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
        ValueError, TypeError: see `add_lora` and `quantize_model`. Nothing is changed then.
    """
    check_arguments(model, config)
    check_name(name)
    quantization = QuantConfig.of(quantization, **settings)
    refuse_adapted(model, "add_qlora")
    config_of_layers = replace(config, init="default") if config.is_loftq else config
    _, saved = places_for(model, config_of_layers)
    found = quantizable_layers(model)
    for layer in found:
        check_before(layer.name, layer.module.weight)
    if not config.starts_from_weight:
        skip = tuple(layer.name for layer in found if inside(layer.name, config.modules_to_save))
        quantize_model(model, quantization, skip=skip, progress=progress)
        return add_lora(model, config, name)
    start = {"origin": fingerprint(model, saved), "quantization": settings or quantization.changes()}
    add_lora(model, config_of_layers, name)
    adapter = mounted_adapter(model)
    adapter.config, adapter.originals, adapter.start = config, None, start
    if config.is_loftq:
        for layer in adapter.layers.values():
            loftq(layer, config.start_iterations or LOFTQ_ITERATIONS, quantization)
    if any(not layer.module.weight.requires_grad for layer in quantizable_layers(model)):
        quantize_model(model, quantization, progress=progress)
    return model
