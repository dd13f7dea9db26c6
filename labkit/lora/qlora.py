"""QLoRA: adapters over a base in four bits, added in the order that the start of the adapter asks for."""

from dataclasses import replace
from typing import Any

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import fingerprint
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.starts import LOFTQ_ITERATIONS, RANDOM_STARTS, loftq
from labkit.models.surgery import inside, is_output_layer
from labkit.quant.config import QuantConfig
from labkit.quant.model import quantize_model


def add_qlora(
    model: nn.Module,
    config: LoRAConfig,
    progress: bool = False,
    quantization: QuantConfig | None = None,
    **settings: Any,
) -> nn.Module:
    """Put adapters on `model` and its linear layers in 4 bits, in the order that the start of the adapter asks for.

    The random starts: quantize, then add. PiSSA and OLoRA: split the weights, then quantize the rest. LoftQ: both in turn.
    The latter two do not keep the original weights, so such an adapter cannot be disabled or put beside others.

    Args:
        model: in full precision.
        config: see `labkit.LoRAConfig`.
        progress: see `labkit.quantize_model`.
        quantization, settings: a `labkit.QuantConfig`, or its values by name.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: see `add_lora` and `quantize_model`.
    """
    quantization = QuantConfig.of(quantization, **settings)
    skip = [name for name in plain_linears(model) if inside(name, config.modules_to_save)]
    if config.init in RANDOM_STARTS:
        quantize_model(model, quantization, skip=tuple(skip), progress=progress)
        return add_lora(model, config)
    start = {"origin": fingerprint(model), "quantization": settings or quantization.changes()}
    fit = config.init.startswith("loftq")
    add_lora(model, replace(config, init="default") if fit else config)
    adapter = model.lora_adapters["default"]
    adapter.config, adapter.originals, adapter.start = config, None, start
    model.lora_config = config
    if fit:
        number = config.init.rpartition("_")[2]
        for layer in lora_layers(model).values():
            loftq(layer, int(number) if number.isdigit() else LOFTQ_ITERATIONS, quantization)
    train = [p for p in model.parameters() if p.requires_grad]
    if set(plain_linears(model)) - set(skip):
        quantize_model(model, quantization, skip=tuple(skip), progress=progress)
    for parameter in train:
        parameter.requires_grad_(True)
    return model


def plain_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that `quantize_model` would quantize."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_output_layer(model, m)]
