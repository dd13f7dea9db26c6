"""Low-rank adaptation: leave the weight alone, and learn a correction of rank r beside it.

    y = W x + (alpha / r) B A x          A: (r, in), B: (out, r), r much smaller than in and out

W is frozen. Only A and B are trained: r * (in + out) parameters instead of in * out. A starts random and B at zero, so
the model before the first step is exactly the base model; and because B = 0, the first gradient of A is zero too and
only B moves. The scaling alpha / r keeps the size of the correction comparable when r is changed.

Why the layer keeps its base as a child module and does not subclass `nn.Linear`: the base can then be anything that
maps x to y: a 32-bit linear, or a 4-bit one (QLoRA), and this file need not know which.

Source: LoRA (Hu et al. 2021), section 4.1. Agrees with: PEFT `tuners/lora/layer.py`.
"""

import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.quant_linear import QuantLinear, is_output_layer, replace_module

PRESETS = {"all-linear": r".*", "attention": r".*(attn|attention).*", "mlp": r".*(mlp|ffn|feed_forward).*"}
VARIANTS = ("lora", "rslora")
INITS = ("default", "gaussian")


@dataclass(frozen=True)
class LoRAConfig:
    """What to add where.

    Args:
        r: rank of the correction, at least 1.
        alpha: numerator of the scaling; the correction is multiplied by alpha / r.
        dropout: probability of dropping an input of the correction in training, 0 <= dropout < 1.
        targets: "all-linear" (every linear layer but the output), "attention", "mlp", a list of layer names
            (`["q_proj", "v_proj"]`: the last parts of a full name count), or a regular expression of full names.
        variant: "lora", or "rslora" with the scaling alpha / sqrt(r) (Kalajdzievski 2023).
        init: "default" draws A from U(-1/sqrt(in), 1/sqrt(in)), as PEFT does; "gaussian" from N(0, 1/r^2). B is 0.

    Raises:
        ValueError: a value is out of its range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] | list[str] = "all-linear"
    variant: str = "lora"
    init: str = "default"

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(
                f"r={self.r!r}: the rank must be a whole number of at least 1; 8 or 16 is a usual start"
            )
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"alpha={self.alpha!r}: alpha must be a positive number; r or 2r is a usual choice"
            )
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: a probability from 0 up to, not including, 1")
        for name, value, allowed in (("variant", self.variant, VARIANTS), ("init", self.init, INITS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; choose one of {allowed}")
        if not self.targets:
            raise ValueError(
                "targets is empty; give 'all-linear', 'attention', 'mlp', names, or a regular expression"
            )

    @property
    def scaling(self) -> float:
        """The factor of the correction: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.r) if self.variant == "rslora" else self.r)


class LoRALinear(nn.Module):
    """A linear layer with a low-rank correction: `base(x) + scaling * B A dropout(x)`.

    Args:
        base: `nn.Linear` or `QuantLinear`; frozen by `add_lora`.
        config: rank, scaling, dropout, initialization.

    Raises:
        ValueError: the rank is above the width of the layer.
    """

    def __init__(self, base: nn.Linear | QuantLinear, config: LoRAConfig):
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if config.r > limit:
            raise ValueError(
                f"r={config.r} is above {limit}, the smaller side of a {base.out_features} x {base.in_features} layer; "
                "a matrix has no higher rank than that. Choose a smaller r, or leave this layer out of targets."
            )
        self.base = base
        self.scaling = config.scaling
        self.dropout = nn.Dropout(config.dropout)
        self.merged_from: Tensor | None = None  # the base weight as it was, while merged
        device = base.packed.device if isinstance(base, QuantLinear) else base.weight.device
        # adapters train in at least fp32: their updates are smaller than bf16 can add to them
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device, dtype=dtype))
        if config.init == "default":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / config.r)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """The correction as a matrix, `scaling * B A`, shape (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = self.base(x)  # (..., out)
        if self.merged_from is not None:
            return y
        if self.training:
            x = self.dropout(x)
        z = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r)
        if y.dtype != self.lora_A.dtype:
            return y + (self.scaling * F.linear(z, self.lora_B)).to(y.dtype)
        # the same sum in one pass over y, which in fp32 is worth a tenth of a training step
        rows = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(*rows, self.lora_B.T, alpha=self.scaling).view_as(y)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}" + (", merged" if self.merged_from is not None else "")


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze `model` and put a `LoRALinear` in place of each linear layer that `config.targets` names.

    Returns:
        `model` itself, changed in place; its output is what it was, because B starts at zero.

    Raises:
        ValueError: the model has adapters already, the targets match no layer, or the rank is too high for one.
            Nothing is changed then.
    """
    if lora_layers(model):
        raise ValueError(
            f"{type(model).__name__} has LoRA adapters already; load a fresh base model to start again"
        )
    if hasattr(model, "method_config"):
        raise ValueError(
            f"{type(model).__name__} is adapted by {type(model.method_config).__name__} already, which this would freeze; "
            "call labkit.beyond_lora.remove(model) first, or load a fresh base model"
        )
    layers = {name: model.get_submodule(name) for name in matching_layers(model, config.targets)}
    adapted = {
        name: LoRALinear(layer, config) for name, layer in layers.items()
    }  # may raise: before any change
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in adapted.items():
        replace_module(model, name, layer.train(layers[name].training))
    model.lora_config = config
    return model


def matching_layers(model: nn.Module, targets: str | tuple[str, ...] | list[str]) -> list[str]:
    """Full names of the linear layers, 32-bit or quantized, that `targets` means; see `LoRAConfig`.

    Raises:
        ValueError: a target matches nothing; the message names the nearest layer name.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLinear)) and not is_output_layer(model, module)
    }
    if isinstance(targets, str) and (targets in PRESETS or not targets.isidentifier()):
        try:
            pattern = re.compile(PRESETS.get(targets, targets))
        except re.error as error:
            raise ValueError(f"targets={targets!r} is not a regular expression: {error}") from None
        matches = [name for name in linears if pattern.fullmatch(name)]
        unmatched = [] if matches else [targets]
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        matches = [name for name in linears if any(f".{name}".endswith(f".{w}") for w in wanted)]
        unmatched = [w for w in wanted if not any(f".{name}".endswith(f".{w}") for name in linears)]
    if unmatched:
        raise ValueError(no_match_message(model, unmatched, linears))
    return matches


def no_match_message(model: nn.Module, unmatched: list[str], linears: dict[str, nn.Module]) -> str:
    last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    near = difflib.get_close_matches(str(unmatched[0]), [*last_parts, *PRESETS], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return (
        f"targets={unmatched} matches no linear layer of {type(model).__name__}{hint} "
        f"Its linear layers are named: {', '.join(last_parts) or 'none at all'}"
    )


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model`, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> nn.Module:
    """Add each correction to its base weight, so that the adapter costs nothing in the forward pass; in place.

    The weights as they were are kept for `unmerge`, which is then exact; that doubles their memory.

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
        if isinstance(layer.base, QuantLinear):
            raise ValueError(
                f"{name} is a 4-bit layer: its sixteen levels cannot take up a small correction without changing the "
                "output. Call dequantize_model(model) first and merge into the 16- or 32-bit weights."
            )
    with torch.no_grad():
        for layer in layers.values():
            layer.merged_from = layer.base.weight.detach()
            merged = layer.merged_from + layer.delta().to(layer.merged_from.dtype)
            layer.base.weight = nn.Parameter(merged, requires_grad=False)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: put back the very base weights that it kept.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in lora_layers(model).values() if layer.merged_from is not None]
    if not merged:
        raise ValueError(f"{type(model).__name__} has no merged adapter to unmerge")
    for layer in merged:
        layer.base.weight = nn.Parameter(layer.merged_from, requires_grad=False)
        layer.merged_from = None
    return model


@contextmanager
def adapter_strength(model: nn.Module, factor: float) -> Iterator[nn.Module]:
    """Within the block the corrections count `factor` times: 0 gives the base model, 1 the adapted one.

    Raises:
        ValueError: there is no adapter, or it is merged and can no longer be told from the base.
    """
    layers = lora_layers(model).values()
    if not layers or any(layer.merged_from is not None for layer in layers):
        raise ValueError("adapter_strength needs an adapter that is not merged; add one, or unmerge it first")
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling *= factor
        yield model
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling = scaling


@dataclass(frozen=True)
class Trainable:
    """Counts of parameters: `per_module` of those that train, `trainable` and `total` over the model.

    A 4-bit weight counts with the number of weights that it stands for, not with its packed bytes.
    """

    per_module: dict[str, int]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.share:.2%})"


def trainable(model: nn.Module) -> Trainable:
    """Count the parameters of `model` that train, per module and in all."""
    per_module: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.rpartition(".")[0]
            per_module[module] = per_module.get(module, 0) + parameter.numel()
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    total = sum(p.numel() for p in model.parameters()) + packed
    return Trainable(per_module, sum(per_module.values()), total)
