"""The tensors of the LoRA family in a PEFT folder: their names and shapes, and what does not fit a model.

After the prefix `base_model.model.`:

    <module>.lora_A.weight (r, in)                <module>.lora_B.weight (out, r)
    <module>.lora_embedding_A (r, vocabulary)     <module>.lora_embedding_B (width, r)
    <module>.lora_magnitude_vector (out,)         DoRA; no ".weight" here
    <module>.<parameter>                          of a module that trained in full

Agrees with: PEFT `utils/save_and_load.py`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.formats.peft_folder import PREFIX, Expected, check_tensors, does_not_fit, misfit
from labkit.lora.config import LoRAConfig
from labkit.lora.mounting import Adapter, standing
from labkit.lora.plain import plain_factors
from labkit.lora.targets import saved_names
from labkit.models.walk import own_name, places, unwrap
from labkit.quant.layer_kinds import is_linear, widths

# by the names of a layer's own parameters here
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
EMBEDDING_NAMES = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
STORED = re.compile(r"(.*)\.(?:lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")


def tensor_names(name: str, base: nn.Module) -> dict[str, str]:
    """How a folder calls the parameters of an adapted layer, by their names here.

    Args:
        name: of the layer.
        base: the layer that is adapted.
    """
    names = EMBEDDING_NAMES if isinstance(base, nn.Embedding) else NAMES
    return {part: f"{PREFIX}{name}.{there}" for part, there in names.items()}


def adapter_tensors(adapter: Adapter, plain: bool) -> dict[str, Tensor]:
    """What a folder holds of an adapter; `plain`: PiSSA and OLoRA as plain LoRA on the original base."""
    tensors: dict[str, Tensor] = {}
    layers = adapter.layers
    for name, module in adapter.modules.items():
        if name not in layers:
            state = {own_name(module, key): tensor for key, tensor in module.state_dict().items()}
            tensors |= {f"{PREFIX}{name}.{key}": tensor.detach().clone() for key, tensor in state.items()}
            continue
        parts = dict(module.named_parameters(recurse=False))
        if plain:
            parts["lora_A"], parts["lora_B"] = plain_factors(module)
        names = tensor_names(name, module.base)
        tensors |= {names[part]: tensor.detach().contiguous() for part, tensor in parts.items()}
    return tensors


def fill(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a folder, which fit, into the modules of an adapter."""
    layers = adapter.layers
    with torch.no_grad():
        for name, module in adapter.modules.items():
            if name not in layers:
                state = {
                    key: tensors[f"{PREFIX}{name}.{own_name(module, key)}"] for key in module.state_dict()
                }
                module.load_state_dict(state)
                continue
            names = tensor_names(name, module.base)
            for part, parameter in module.named_parameters(recurse=False):
                parameter.copy_(tensors[names[part]])


def expected_tensors(model: nn.Module, config: LoRAConfig, names: Sequence[str]) -> dict[str, Expected]:
    """What a folder has to hold for these layers and for `config.modules_to_save`."""
    expected: dict[str, Expected] = {}
    for name in names:
        base, r = unwrap(standing(model, name)), config.for_layer(name).r
        inputs, outputs = widths(base)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (r, inputs), "lora_B": (outputs, r)}
        if config.is_dora:
            shapes["lora_magnitude"] = (outputs,)
        there, dtype = tensor_names(name, base), torch.promote_types(base.weight.dtype, torch.float32)
        expected |= {there[part]: Expected(shape, dtype) for part, shape in shapes.items() if part in there}
    for name in config.modules_to_save:
        there = standing(model, name)
        state = {own_name(there, key): tensor for key, tensor in there.state_dict().items()}
        expected |= {f"{PREFIX}{name}.{key}": Expected(tuple(t.shape), t.dtype) for key, t in state.items()}
    return expected


def check_adapter(
    model: nn.Module, config: LoRAConfig, names: list[str], tensors: dict[str, Tensor], path: Path
) -> None:
    """Compare what a folder holds with what the layers `names` of `model` take under `config`.

    Raises:
        AdapterMismatch: naming every tensor that is missing, does not fit, or is left over.
        ValueError: a module that trained in full has a weight that is tied or quantized here.
    """
    modules = {name: module for name, _, module in places(model)}
    adaptable = [n for n in names if is_linear(modules[n]) or isinstance(modules[n], nn.Embedding)]
    problems = [
        f"{name} is a {type(modules[name]).__name__}, which cannot have an adapter here"
        for name in names
        if name not in adaptable
    ]

    def left_over(key: str) -> str | None:
        module = key.rpartition(".")[0].removeprefix(PREFIX)
        own = modules.get(module.removesuffix(".base_layer"))
        if key.endswith(".weight") and isinstance(own, (nn.Embedding, nn.Linear)):
            # PEFT saves embeddings and the output layer too, where it adapts them or their vocabulary was changed
            if same_values(own.weight, tensors[key]):
                return None
            return f"{key} is not the weight of this base: was its vocabulary changed?"
        stored = STORED.fullmatch(key)
        if stored is None:
            return f"{key} is not a LoRA weight, nor of a module in modules_to_save"
        module = stored[1].removeprefix(PREFIX)
        if module not in modules:
            return f"{module}: no such linear layer in {type(unwrap(model)).__name__}"
        return f"{key} is left over: target_modules do not mean {module}, or it is of another variant"

    check_tensors(expected_tensors(model, config, adaptable), tensors, path, left_over, problems)
    if not names:
        raise does_not_fit(path, [f"its target_modules mean no layer of {type(unwrap(model)).__name__}"])
    saved_names(model, config.modules_to_save)  # refuses tied weights and quantized modules


def same_values(weight: Tensor, saved: Tensor) -> bool:
    """Is `saved` the weight, but for its dtype and device?"""
    fits = misfit(saved, Expected(tuple(weight.shape), weight.dtype)) is None
    return fits and torch.equal(weight.to(saved), saved)
