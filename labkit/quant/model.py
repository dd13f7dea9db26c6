"""A whole model to four bits and back: its linear layers replaced one by one, and a report of the bytes.

Which layers those are is asked of the one walk over a model (`labkit.models.walk`), which goes through wrappers and
adapters and knows a layer under all its names. A layer is replaced if a `QuantLinear` computes what it computes: it
is an `nn.Linear` or a `Conv1D` with nothing added, neither a forward pass nor parameters of its own. Adapters are no
part of the model that is quantized. What was not reached is in the report.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.models.surgery import detach_from_file, ends_with, no_match_message
from labkit.models.walk import (
    CONV1D,
    EMBEDDING,
    LINEAR,
    PACKED,
    SUBCLASS,
    Layer,
    adapters_in,
    describe,
    is_a,
    left_out,
    total_bytes,
    unwrap,
    walk,
)
from labkit.quant.config import QuantConfig
from labkit.quant.layer_kinds import dense_weight, is_conv1d
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor, check_finite, check_quantizable, quantize

MUCH = 0.1  # of a model's bytes; if more is left in full precision than one expects, a warning says so
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


class LayerReport(dict):
    """Bytes per layer name, `{name: (before, after)}`, of the layers that were quantized; a table as its text.

    Attributes:
        before, after: bytes of these layers.
        model_before, model_after: bytes of the whole model, its embeddings and adapters included.
        left: the layers that keep their precision.
    """

    def __init__(self, model_before: int = 0):
        super().__init__()
        self.model_before = self.model_after = model_before
        self.left: list[Layer] = []

    @property
    def before(self) -> int:
        return sum(b for b, _ in self.values())

    @property
    def after(self) -> int:
        return sum(a for _, a in self.values())

    def __str__(self) -> str:
        rows = [*self.items(), ("total", (self.before, self.after))]
        if self.model_before:
            rows.append(("whole model", (self.model_before, self.model_after)))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {b / 1e6:9.3f} MB -> {a / 1e6:8.3f} MB" for name, (b, a) in rows]
        return "\n".join([*lines, *([f"left as it was: {describe(self.left)}"] if self.left else [])])


def quantize_model(
    model: nn.Module,
    config: QuantConfig | str | None = None,
    *others: Any,
    skip: str | tuple[str, ...] = (),
    progress: bool = True,
    **settings: Any,
) -> LayerReport:
    """Replace every linear layer of `model` by a `QuantLinear`, one by one, in place.

    Each full weight is released before the next layer is quantized; weights that are views of a mapped file,
    as safetensors loads them, are released together after the last. The output layer (`lm_head`) and
    embeddings keep their precision. Every parameter is frozen; but if some layers are frozen already, as under
    adapters of any kind, those are quantized, and what trains goes on training.

    Args:
        model: any module with linear layers (`nn.Linear`, GPT-2's `Conv1D`), wrapped or adapted or not.
        config, others, settings: a `QuantConfig`, or its values, as for `labkit.quantize`.
        skip: a name, or several, of layers to leave alone; the last part of a name is enough.
        progress: show a progress bar.

    Returns:
        A `LayerReport` of bytes before and after for each layer, and of what was left. A warning says so if that is
        much, and neither embedding nor output layer.

    Raises:
        ValueError: there is nothing to quantize (no linear layer, or quantized already), `skip` matches no
            layer, a weight is not finite, an adapter is merged or keeps weights from before, or the value of a
            setting is not allowed. Nothing is changed then.
        TypeError: the dtype of a weight cannot be quantized, or there is no such setting. Nothing is changed
            then.
    """
    config = QuantConfig.of(config, *others, **settings)
    skip = (skip,) if isinstance(skip, str) else skip
    found = quantizable_layers(model)
    layers = without_skipped(model, found, skip)
    frozen = [layer for layer in layers if not layer.module.weight.requires_grad]
    is_adapted = bool(frozen or adapters_in(model) or any(layer.kind == PACKED for layer in walk(model)))
    layers = frozen if is_adapted else layers
    if not layers:
        raise ValueError(
            f"nothing to quantize in {type(unwrap(model)).__name__}: {why_nothing(model, found)}"
        )
    check_adapters(model)
    for layer in layers:
        check_before(layer.name, layer.module.weight)
    report = LayerReport(bytes_of(model))
    if not is_adapted:
        model.requires_grad_(False)
    detach_from_file(model, {id(layer.module.weight) for layer in layers})
    places, shared = places_of(model), how_often([layer.module.weight for layer in layers])
    made: dict[int, QuantizedTensor] = {}  # of weights that several layers share
    for layer in tqdm(layers, desc="quantize", unit="layer", disable=not progress, leave=False):
        old, key = layer.module, id(layer.module.weight)
        weight = made.pop(key) if key in made else quantize(dense_weight(old), config)
        if shared[key] > 1:
            made[key], shared[key] = weight, shared[key] - 1
        new = QuantLinear.in_place_of(old, weight, config.compute_dtype)
        if new.bias is not None:
            new.bias.requires_grad_(is_adapted and old.bias.requires_grad)
        for hooks in HOOKS:  # the same collections, so that a hook's handle still removes it
            setattr(new, hooks, getattr(old, hooks))
        for parent, child in places.pop(id(old)):
            setattr(parent, child, new)
        report[layer.name] = (old.weight.nbytes, weight.nbytes)
        layer.module = new
    report.model_after, report.left = bytes_of(model), left_out(model, report.keys())
    warn_of_much(report, skip)
    return report


def quantizable_layers(model: nn.Module) -> list[Layer]:
    """The layers that `quantize_model` replaces: see the module docstring. The output layer is none of them.

    Nor is a layer whose weight another module holds too that keeps its precision (an embedding): that would save
    nothing.
    """
    layers = walk(model)
    found = [one for one in layers if is_replaceable(one) and not one.is_output and one.module is not model]
    chosen = {id(layer.module) for layer in found}
    kept = {id(t) for layer in layers if id(layer.module) not in chosen for t in layer.tensors}
    return [layer for layer in found if id(layer.module.weight) not in kept]


def without_skipped(model: nn.Module, found: list[Layer], skip: tuple[str, ...]) -> list[Layer]:
    """Those of `found` that no name of `skip`, or last part of one, means.

    Raises:
        ValueError: `skip` matches none of them.
    """
    for wanted in skip:
        if not any(ends_with(name, wanted) for layer in found for name in layer.names):
            known = [layer.name for layer in found]
            raise ValueError(no_match_message(f"skip={wanted!r}", wanted, unwrap(model), known))
    return [one for one in found if not any(ends_with(name, part) for name in one.names for part in skip)]


def is_replaceable(layer: Layer) -> bool:
    """Does a `QuantLinear` with the same weight and bias compute what this layer does?"""
    module = layer.module
    if layer.kind not in (LINEAR, SUBCLASS, CONV1D) or (layer.kind == CONV1D and not is_conv1d(module)):
        return False
    kind: Any = nn.Linear
    if layer.kind == CONV1D:
        kind = next(base for base in type(module).__mro__ if base.__name__ == "Conv1D")
    return (
        type(module).forward is kind.forward
        and "forward" not in vars(module)
        and module._parameters.keys() == {"weight", "bias"}
        and module.weight is not None
        and not module._buffers
        and not module._modules
    )


def why_nothing(model: nn.Module, found: list[Layer]) -> str:
    """Why there is no layer to quantize."""
    if any(layer.module.weight.requires_grad for layer in found):
        return "the weights of its linear layers train; call model.requires_grad_(False) on those to quantize"
    if any(layer.kind == PACKED for layer in walk(model)):
        return "its linear layers are quantized already"
    return "it has no linear layer besides the output layer"


def check_adapters(model: nn.Module) -> None:
    """Raise a `ValueError` if an adapter is in the weights to quantize, keeps those from before, or could not read
    4-bit ones."""
    for module in model.modules():
        if getattr(module, "is_merged", False) is True or (is_a(module, "BaseTunerLayer") and module.merged):
            raise ValueError(
                f"an adapter is merged into the weights of {type(unwrap(model)).__name__}, and could not be taken out "
                "of 4-bit ones; unmerge it first, or call unload to keep it in them for good"
            )
        if is_a(module, "BaseTunerLayer") and len(getattr(module, "lora_magnitude_vector", ())):
            raise ValueError(
                "PEFT's DoRA cannot read the 4-bit weights of other libraries; load the adapter with "
                "labkit.load_adapter, or quantize the base with bitsandbytes"
            )
        record = module.__dict__.get("lora_adapters")  # see `labkit.lora.mounting`
        for name, adapter in (record.by_name if record else {}).items():
            if adapter.originals and any(layer.has_own_base for layer in adapter.layers.values()):
                raise ValueError(
                    f"the adapter {name!r} (init={adapter.config.init!r}) has split the full weights, and keeps them to "
                    "be taken out again; load a fresh model and call add_qlora, which quantizes what the split leaves"
                )


def check_before(name: str, weight: Tensor) -> None:
    """Raise what quantizing this layer would raise, with its name, before any layer is replaced."""
    try:
        check_quantizable(weight)
        check_finite(torch.stack(weight.detach().aminmax()).abs(), weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By a module's id, the modules whose child it is, and its names there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            places.setdefault(id(module), []).append((parent, child))
    return places


def how_often(tensors: Iterable[Tensor]) -> dict[int, int]:
    """By its id, how often each tensor is there."""
    counts: dict[int, int] = {}
    for tensor in tensors:
        counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    return counts


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def warn_of_much(report: LayerReport, skip: tuple[str, ...]) -> None:
    """Warn if much was left that is neither embedding nor output layer, nor skipped, nor trained."""
    ends = {
        id(t) for layer in report.left if layer.is_output or layer.kind == EMBEDDING for t in layer.tensors
    }
    unexpected = [
        layer
        for layer in report.left
        if layer.kind != PACKED
        and not any(id(tensor) in ends for tensor in layer.tensors)
        and not any(ends_with(name, part) for name in layer.names for part in skip)
        and not any(tensor.requires_grad for tensor in layer.tensors)
    ]
    share = total_bytes(unexpected) / report.model_before
    if share > MUCH:
        warnings.warn(
            f"quantize_model cannot reach {share:.0%} of the bytes of this model, which stay as they were: "
            f"{describe(unexpected)}",
            stacklevel=3,
        )


def quantized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, QuantLinear]]:
    """Every place of a `QuantLinear`: the module whose child it is, and its name there."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if isinstance(module, QuantLinear):
                yield parent, child, module


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `QuantLinear` by an `nn.Linear` with the dequantized weight, in place.

    What was a `Conv1D` is one again. The inverse of `quantize_model` up to the quantization error, which stays in
    the weights. Returns `model`.
    """
    made: dict[int, nn.Module] = {}
    for parent, child, module in quantized_layers(model):
        if id(module) not in made:
            made[id(module)] = module.to_linear(dtype)
        setattr(parent, child, made[id(module)])
    return model
