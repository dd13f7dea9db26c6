"""A whole model to four bits and back: its linear layers replaced one by one, and a report of the bytes."""

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.models.surgery import (
    detach_from_file,
    ends_with,
    is_output_layer,
    no_match_message,
    replace_module,
)
from labkit.quant.config import QuantConfig
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import check_finite, check_quantizable


class LayerReport(dict):
    """Bytes per layer name: `{name: (before, after)}`, with `.before`, `.after` and a table as its text."""

    @property
    def before(self) -> int:
        return sum(b for b, _ in self.values())

    @property
    def after(self) -> int:
        return sum(a for _, a in self.values())

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=5)
        rows = [f"{name:{width}}  {b / 1e6:9.3f} MB -> {a / 1e6:8.3f} MB" for name, (b, a) in self.items()]
        total = f"{'total':{width}}  {self.before / 1e6:9.3f} MB -> {self.after / 1e6:8.3f} MB"
        return "\n".join([*rows, total])


def quantize_model(
    model: nn.Module,
    config: QuantConfig | str | None = None,
    *others: Any,
    skip: str | tuple[str, ...] = (),
    progress: bool = True,
    **settings: Any,
) -> LayerReport:
    """Replace every `nn.Linear` of `model` by a `QuantLinear`, one by one, in place.

    Each full weight is released before the next layer is quantized; weights that are views of a mapped file,
    as safetensors loads them, are released together after the last. The output layer (`lm_head`) and
    embeddings keep their precision, and every parameter is frozen.

    Args:
        model: any module with linear layers.
        config, others, settings: a `QuantConfig`, or its values, as for `labkit.quantize`.
        skip: a name, or several, of layers to leave alone; the last part of a name is enough.
        progress: show a progress bar.

    Returns:
        A `LayerReport` of bytes before and after for each layer.

    Raises:
        ValueError: there is nothing to quantize (no linear layer, or quantized already), `skip` matches no
            layer, a weight is not finite, or the value of a setting is not allowed. Nothing is changed then.
        TypeError: the dtype of a weight cannot be quantized, or there is no such setting. Nothing is changed
            then.
    """
    config = QuantConfig.of(config, *others, **settings)
    skip = (skip,) if isinstance(skip, str) else skip
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_output_layer(model, m)
    }
    for wanted in skip:
        if not any(ends_with(name, wanted) for name in linears):
            raise ValueError(no_match_message(f"skip={wanted!r}", wanted, model, linears))
    names = [name for name in linears if not any(ends_with(name, one) for one in skip)]
    if not names:
        reason = "it has no linear layer besides the output layer"
        if any(isinstance(m, QuantLinear) for m in model.modules()):
            reason = "its linear layers are quantized already"
        raise ValueError(f"nothing to quantize in {type(model).__name__}: {reason}")
    for name in names:
        check_before(name, linears[name].weight)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    detach_from_file(model, {id(linears[name].weight) for name in names})
    report = LayerReport()
    for name in tqdm(names, desc="quantize", unit="layer", disable=not progress, leave=False):
        linear = linears.pop(name)
        layer = QuantLinear.from_linear(linear, config)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        replace_module(model, name, layer)
        report[name] = (linear.weight.nbytes, layer.weight.nbytes)
    return report


def check_before(name: str, weight: Tensor) -> None:
    """Raise what quantizing this layer would raise, with its name, before any layer is replaced."""
    try:
        check_quantizable(weight)
        check_finite(torch.stack(weight.detach().aminmax()).abs(), weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `QuantLinear` by an `nn.Linear` with the dequantized weight, in place.

    The inverse of `quantize_model` up to the quantization error, which stays in the weights. Returns `model`.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            replace_module(model, name, module.to_linear(dtype))
    return model
