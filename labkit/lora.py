"""Low-rank adaptation: leave the weight alone, and learn a correction of rank r beside it.

    y = W x + (alpha / r) B A x          A: (r, in), B: (out, r), r much smaller than in and out

W is frozen. Only A and B are trained: r * (in + out) parameters instead of in * out. A starts random and B at zero, so
the model before the first step is exactly the base model; and because B = 0, the first gradient of A is zero too and
only B moves. The scaling alpha / r keeps the size of the correction comparable when r is changed.

Why the layer keeps its base as a child module and does not subclass `nn.Linear`: the base can then be anything that
maps x to y: a 32-bit linear, a 4-bit one (QLoRA), or GPT-2's transposed one, and the forward pass need not know which.

Nothing here merges on its own, as `.eval()` does in some libraries: `merge` and `unmerge` are calls that you write.

Source: LoRA (Hu et al. 2021), section 4.1. Agrees with: PEFT `tuners/lora/layer.py`.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from labkit.lora_config import LoRAConfig, pattern_matches
from labkit.models.surgery import replace_module
from labkit.quant.linear import QuantLinear
from labkit.quant.linears import dense_weight, is_four_bit, is_transposed, widths
from labkit.quant.tensor import QuantizedTensor, quantize
from labkit.targets import matching_layers, saved_names

__all__ = [
    "Adapter",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "adapter_strength",
    "add_lora",
    "lora_layers",
    "matching_layers",
    "merge",
    "unmerge",
]


class LoRALinear(nn.Module):
    """A linear layer with a low-rank correction: `base(x) + scaling * B A dropout(x)`.

    Args:
        base: `nn.Linear`, `QuantLinear` or Conv1D; frozen by `add_lora`.
        config: rank, scaling, dropout, initialization.
    """

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__()
        self.base = base
        self.scaling = config.scaling
        self.dropout = nn.Dropout(config.dropout)
        self.merged_from: Tensor | QuantizedTensor | None = None  # the base weight as it was, while merged
        self.in_features, self.out_features = widths(base)
        device = base.packed.device if isinstance(base, QuantLinear) else base.weight.device
        # adapters train in at least fp32: their updates are smaller than bf16 can add to them
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(config.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, device=device, dtype=dtype))
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.r)
        elif config.init in ("b_random", "b_random_small"):
            fan_in = config.r if config.init == "b_random" else self.in_features
            nn.init.uniform_(self.lora_B, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        else:  # the starts that use the weight are made later
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """The correction as a matrix, `scaling * B A`, shape (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The one weight that does what `weight`, the base's, (out, in), and the adapter do together."""
        return weight + self.delta().to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)  # (rows, out)
        if self.merged_from is None:
            if self.training:
                rows = self.dropout(rows)
            z = F.linear(rows.to(self.lora_A.dtype), self.lora_A)  # (rows, r)
            y = add_product(y, z, self.lora_B, self.scaling)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}" + (", merged" if self.merged_from is not None else "")


# PyTorch's counter of operations knows `addmm`, but not that it can be in place
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


def add_product(y: Tensor, z: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`y + scaling * z B^T` in the dtype of y: y (rows, out), z (rows, r), B (out, r); where the dtypes allow it, in place.

    The sum overwrites y, the base's output, which nothing else needs: not the base's backward pass either. Without a copy
    of it a training step takes 4 % less time. A hook on the base that wants its output for later has to clone it.
    """
    if y.dtype != B.dtype:
        return y + (scaling * F.linear(z, B)).to(y.dtype)
    return y.addmm_(z, B.T, alpha=scaling)


class LoRAEmbedding(LoRALinear):
    """`LoRALinear` over an embedding: for a one-hot x, A x is a column of A, and is looked up instead of multiplied.

    A (r, vocabulary) starts at zero and B (width, r) from N(0, 1), as in PEFT; there is no dropout of one-hot rows.
    """

    def __init__(self, base: nn.Embedding, config: LoRAConfig):
        super().__init__(base, config)
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids to (..., width)."""
        y = self.base(ids)
        if self.merged_from is not None:
            return y
        z = F.embedding(ids, self.lora_A.T, self.base.padding_idx)  # (..., r)
        scale = getattr(self.base, "embed_scale", 1.0)  # Gemma's embedding multiplies what it looks up
        return y + (scale * self.scaling * F.linear(z, self.lora_B)).to(y.dtype)


@dataclass
class Adapter:
    """A named adapter of a model: what it puts in place of which modules, and what was there.

    Attributes:
        config: as given.
        modules: by full name, a `LoRALinear`, or a copy of a module that trains in full (`modules_to_save`).
        originals: the base's own modules that a layer here does not have as its `base`, by full name: those of copies, and
            those that PiSSA and its like made another base from. None when a 4-bit start did not keep them.
        start: how to make the base again that was not kept: {"origin": the fingerprint of the model before,
            "quantization": settings}.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module]
    originals: dict[str, nn.Module] | None
    start: dict | None = None

    def base_modules(self) -> dict[str, nn.Module]:
        """The modules of the base model that this adapter replaces."""
        return {n: m.base for n, m in self.modules.items() if n not in self.originals} | self.originals


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Freeze `model` and put a `LoRALinear` in place of each linear layer that `config.targets` names.

    Returns:
        `model` itself, changed in place; its output is what it was, because B starts at zero.

    Raises:
        ValueError: the model has adapters already, the targets match no layer, or the rank is too high for one.
            Nothing is changed then.
    """
    if lora_layers(model) or getattr(model, "lora_adapters", None):
        raise ValueError(
            f"{type(model).__name__} has LoRA adapters already; load a fresh base model to start again, or put a second "
            "one beside the first with labkit.add_adapter(model, name, config)"
        )
    if hasattr(model, "method_config"):
        raise ValueError(
            f"{type(model).__name__} is adapted by {type(model.method_config).__name__} already, which this would freeze; "
            "call labkit.beyond_lora.remove(model) first, or load a fresh base model"
        )
    adapter = make_adapter(model, config)  # may raise: before any change
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lora_adapters = {name: adapter}
    put_in_place(model, name)
    return model


def make_adapter(model: nn.Module, config: LoRAConfig, names: list[str] | None = None) -> Adapter:
    """The layers of a new adapter, not yet in the model; `names`, full and exact, in place of `config.targets`.

    Raises:
        ValueError: see `add_lora`.
    """
    from labkit.variants import make_layer  # which builds on this module

    if names is None:  # what was saved may have more rank than it needs: PiSSA as plain LoRA of rank 2r
        names = matching_layers(model, config.targets, config.modules_to_save)
        check_ranks(model, config, names)
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(key, name) for name in names):
            raise ValueError(
                f"the pattern {key!r} matches none of the {len(names)} layers that targets chose"
            )
    base = {name: model.get_submodule(name) for name in (*names, *saved_names(model, config.modules_to_save))}
    modules = {
        name: make_layer(base[name], config.for_layer(name))
        if name in names
        else copy.deepcopy(base[name]).requires_grad_(True)
        for name in base
    }
    for name, module in modules.items():
        module.train(base[name].training)
    changed = {
        n: base[n] for n, m in modules.items() if not isinstance(m, LoRALinear) or m.base is not base[n]
    }
    return Adapter(config, modules, changed)


def check_ranks(model: nn.Module, config: LoRAConfig, names: list[str]) -> None:
    for name in names:
        r, (inputs, outputs) = config.for_layer(name).r, widths(model.get_submodule(name))
        if r > min(inputs, outputs):
            raise ValueError(
                f"r={r} is above {min(inputs, outputs)}, the smaller side of a {outputs} x {inputs} layer ({name}); "
                "a matrix has no higher rank than that. Choose a smaller r, or leave this layer out of targets."
            )


def adapter_in_place(model: nn.Module) -> Adapter | None:
    """The adapter that `model` computes with; None for the base alone."""
    return getattr(model, "lora_adapters", {}).get(getattr(model, "lora_active", None))


def put_in_place(model: nn.Module, name: str) -> None:
    """Put the modules of an adapter where those of the base are."""
    adapter = model.lora_adapters[name]
    for path, module in adapter.modules.items():
        replace_module(model, path, module)
    model.lora_config, model.lora_active = adapter.config, name


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model`, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module, requantize: bool = False) -> nn.Module:
    """Add each correction to its base weight, so that the adapter costs nothing in the forward pass; in place.

    The weights as they were are kept for `unmerge`, which is then exact; that doubles their memory.

    Args:
        model: with adapters.
        requantize: merge into 4-bit bases too: dequantize, add, and quantize again, which changes the output.

    Raises:
        ValueError: there is no adapter, it is merged already, or a base is in 4 bits (nothing is changed then).
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA adapter to merge; call add_lora or load_adapter first"
        )
    for name, layer in layers.items():
        if layer.merged_from is not None:
            raise ValueError(f"the adapter is merged already ({name}); unmerge it first")
        if is_four_bit(layer.base) and not (requantize and isinstance(layer.base, QuantLinear)):
            raise ValueError(
                f"{name} is a 4-bit layer: its sixteen levels cannot take up a small correction without changing the "
                "output. Call dequantize_model(model) first and merge into the 16- or 32-bit weights; or, knowing that, "
                "merge(model, requantize=True)."
            )
    with torch.no_grad():
        for layer in layers.values():
            merge_layer(layer)
    return model


def merge_layer(layer: LoRALinear) -> None:
    base, merged = layer.base, layer.merged_weight(dense_weight(layer.base))  # (out, in)
    if isinstance(base, QuantLinear):
        layer.merged_from = base.weight
        again = quantize(merged, base.codebook, base.blocksize, base.double_quant)
        layer.base = four_bit_like(base, again)
    else:
        layer.merged_from = base.weight.detach()
        base.weight = nn.Parameter(merged.T if is_transposed(base) else merged, requires_grad=False)


def four_bit_like(layer: QuantLinear, weight: QuantizedTensor) -> QuantLinear:
    """The frozen `layer` with another weight."""
    return QuantLinear(weight, layer.bias, layer.compute_dtype).train(layer.training).requires_grad_(False)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: put back the very base weights that it kept.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in lora_layers(model).values() if layer.merged_from is not None]
    if not merged:
        raise ValueError(f"{type(model).__name__} has no merged adapter to unmerge")
    for layer in merged:
        if isinstance(layer.base, QuantLinear):
            layer.base = four_bit_like(layer.base, layer.merged_from)
        else:
            layer.base.weight = nn.Parameter(layer.merged_from, requires_grad=False)
        layer.merged_from = None
    return model


@contextmanager
def adapter_strength(model: nn.Module, factor: float) -> Iterator[nn.Module]:
    """Within the block the corrections count `factor` times: 0 gives the base model, 1 the adapted one.

    Raises:
        ValueError: there is no adapter, it is merged and can no longer be told from the base, or it is no sum of the base and
            a correction (DoRA; PiSSA and its like, whose base is not the model's).
    """
    layers = lora_layers(model).values()
    if not layers or any(layer.merged_from is not None for layer in layers):
        raise ValueError("adapter_strength needs an adapter that is not merged; add one, or unmerge it first")
    if any(hasattr(layer, "lora_magnitude") or hasattr(layer, "start_A") for layer in layers):
        raise ValueError(
            "adapter_strength scales a correction that is added to the base, and this adapter is not of that form. For PiSSA, "
            "OLoRA: variants.to_plain_lora(model) first. For all: labkit.disabled(model) is strength 0"
        )
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling *= factor
        yield model
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling = scaling
