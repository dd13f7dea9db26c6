"""Quantization-aware LoRA: train the adapter on the weight that will be served, the merged one in 4 bits.

    y = Q(V) x,  V = W + s B A          Q: quantize and dequantize
    dL/dV := dL/dQ(V)                   so dL/dA = s B^T dL/dQ(V),  dL/dB = s dL/dQ(V) A^T

QLoRA trains on Q(W) + s B A, which is no 4-bit weight: merged and quantized again, it is another model, often one
without the update. Here the rounding is in the forward pass, so the loss sees it. Q is a staircase, flat almost
everywhere; its gradient is taken as that of the identity, "straight through".

The adapter stays a plain one, on a base in full precision: it is saved, merged and combined as any other. The
price is memory and time: W is not in 4 bits while training, and each step quantizes every weight.

Source: the estimator is from Bengio et al. 2013, section 4.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.lora.layer import LoRALinear
from labkit.models.stand_in import StandIn
from labkit.models.surgery import swap_modules
from labkit.models.walk import PACKED, Layer, unwrap, walk
from labkit.quant.config import QuantConfig
from labkit.quant.layer_kinds import is_transposed
from labkit.quant.linear import multiply
from labkit.quant.model import check_before, quantizable_layers, without_skipped
from labkit.quant.tensor import quantize


class _StraightThrough(torch.autograd.Function):
    """A weight rounded to 4 bits, as a tensor of `dtype`. The gradient passes the rounding as if it were not there."""

    @staticmethod
    def forward(ctx, weight: Tensor, config: QuantConfig, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return quantize(weight, config).dequantize(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


class QATLinear(StandIn):
    """A linear layer, with or without an adapter, that computes as its merged weight in 4 bits would.

    Args:
        base: `nn.Linear`, Conv1D, or a `LoRALinear` over one.
        quantization: how to round.
    """

    def __init__(self, base: nn.Module, quantization: QuantConfig):
        super().__init__(base)
        self.quantization = quantization
        self.train(base.training)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The weight in 4 bits, dequantized to `dtype`, (out, in); its gradient goes to what is trained."""
        weight = self.base.weight  # of a LoRALinear, W + s B A
        return _StraightThrough.apply(
            weight.T if is_transposed(unwrap(self)) else weight, self.quantization, dtype
        )

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, stored as the base stores its own."""
        weight = self.rounded(self.base.weight.dtype)
        return weight.T if is_transposed(unwrap(self)) else weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out): what a `QuantLinear` with the merged weight gives."""
        dtype = self.quantization.compute_dtype or x.dtype
        return multiply(x, self.rounded(dtype), self.bias, dtype)

    def extra_repr(self) -> str:
        return f"{self.quantization.codebook}, blocksize={self.quantization.blocksize}"


@contextmanager
def quantization_aware(
    model: nn.Module,
    quantization: QuantConfig | None = None,
    *,
    skip: str | tuple[str, ...] = (),
    **settings: object,
) -> Iterator[nn.Module]:
    """Within the block `model` computes, and trains, as it will once it is merged and quantized.

        labkit.add_lora(model, config)
        with labkit.lora.quantization_aware(model):
            labkit.train(model, tokenizer, records)
        labkit.unload(model)
        labkit.quantize_model(model)            # gives the very outputs that the model gave in the block

    All layers are rounded that `quantize_model` would quantize, those without an adapter too.

    Args:
        model: in full precision, usually with an adapter mounted; another may be mounted within the block.
        quantization, settings: a `labkit.QuantConfig`, or its values by name, as for `quantize_model` afterwards.
        skip: layers that stay in full precision, as for `quantize_model`.

    Yields:
        `model`, changed in place. When the block ends, its own layers are back, with what they learned.

    Raises:
        ValueError: a layer is in 4 bits already, an adapter has dropout or is none of ours, nothing can be rounded,
            or a setting is not allowed. Nothing is changed then.
        TypeError: see `labkit.quantize_model`.
    """
    config = QuantConfig.of(quantization, **settings)
    layers = layers_to_round(model, (skip,) if isinstance(skip, str) else skip)
    aware = {layer.name: QATLinear(model.get_submodule(layer.paths[0]), config) for layer in layers}
    swap_modules(model, aware)
    try:
        yield model
    finally:
        for parent in list(model.modules()):
            for child, module in parent._modules.items():
                if isinstance(module, QATLinear):
                    setattr(parent, child, module.base)


def layers_to_round(model: nn.Module, skip: tuple[str, ...]) -> list[Layer]:
    """The layers that will be served in 4 bits; see `quantization_aware` for what is refused."""
    name = type(unwrap(model)).__name__
    if any(isinstance(module, QATLinear) for module in model.modules()):
        raise ValueError(f"{name} is within a quantization_aware block already; leave that one first")
    packed = [layer.name for layer in walk(model) if layer.kind == PACKED]
    if packed:
        raise ValueError(
            f"{packed[0]} is in 4 bits already, so its weight from before, which the sum is rounded from, is gone. Load "
            "the model in full precision, and the adapter onto it"
        )
    layers = without_skipped(model, quantizable_layers(model), skip)
    if not layers:
        raise ValueError(f"{name} has no linear layer to round to 4 bits besides the output layer")
    for layer in layers:
        there = model.get_submodule(layer.paths[0])
        if there is not layer.module and not isinstance(there, LoRALinear):
            raise ValueError(
                f"{layer.name} is within a {type(there).__name__}, whose part in the weight is not known here. Take it "
                "off; labkit.load_adapter reads adapters of PEFT"
            )
        if isinstance(there, LoRALinear) and there.dropout.p > 0:
            raise ValueError(
                f"the adapter of {layer.name} has dropout={there.dropout.p:g}, which drops inputs of the correction "
                "alone; here it has none, since it is part of one weight. Use LoRAConfig(dropout=0)"
            )
        check_before(layer.name, layer.module.weight)
    return layers
