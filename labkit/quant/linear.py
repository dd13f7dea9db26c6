"""A linear layer whose frozen weight stays in four bits, also between forward and backward.

    forward:   y = x W'^T + b          W' = dequantize(packed), made, used, and dropped
    backward:  dL/dx = dL/dy W'        W' made again from the same packed bytes

The weight is frozen, so dL/dW is not needed; but dL/dx needs W'. If W' were an ordinary tensor of the graph,
autograd would keep it from forward to backward, for every layer at once: the full model, nothing saved. So
the autograd function below saves the *packed* weight and dequantizes twice. That costs one extra pass over
the weights, and never more memory than one layer (`labkit.quant.scratch`). That function knows one way to
differentiate. Under any other (forward mode, `torch.func`, a tracer) W' is an ordinary tensor after all.

The product is taken in `compute_dtype`, QLoRA's "computation data type", to which x and W' are rounded first.
bf16 pays where the processor has matrix units for it.

Source: QLoRA (Dettmers et al. 2023), equation 5. Agrees with: bitsandbytes' `MatMul4Bit`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.models.walk import CONV1D, kind_of
from labkit.quant.config import QuantConfig, check_compute_dtype
from labkit.quant.direct import multiplies_directly, multiply_directly
from labkit.quant.kernels.dispatch import is_ordinary, is_traced
from labkit.quant.scratch import dequantize_to_scratch
from labkit.quant.state import DESCRIPTION, describe, read_weight, tensors_by_name
from labkit.quant.tensor import NestedScales, QuantizedTensor, quantize


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = x W'^T + b, (..., in) to (..., out), the product in `dtype`; W' = `matrix` is in it already."""
    y = F.linear(x.to(dtype), matrix, None if bias is None else bias.to(dtype))
    return y if dtype == x.dtype else y.to(x.dtype)  # a dtype that autocast has chosen stays


class _QuantizedLinear(torch.autograd.Function):
    """`multiply`, with only the packed weight kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype  # packed bytes and scales: the layer's own buffers
        return multiply(x, dequantize_to_scratch(weight, dtype), bias, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        to_x, _, to_bias, _ = ctx.needs_input_grad
        grad_x = None
        if to_x:  # (..., out) @ (out, in)
            grad_x = (grad.to(ctx.dtype) @ dequantize_to_scratch(ctx.weight, ctx.dtype)).to(grad.dtype)
        return grad_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, None


class QuantLinear(nn.Module):
    """`nn.Linear` with a frozen 4-bit weight. Gradients flow to x and to the bias only.

    Its state is in buffers (`packed`, and `absmax` or `absmax_codes`, `absmax_absmax`, `absmax_offset`), so
    like any module it moves between devices, is saved in a `state_dict`, and can be copied. A `state_dict` says
    how to read itself (`labkit.quant.state`), and a layer that loads it takes on its codebook and block size.
    `.half()` and `.bfloat16()` change the dtype that its weight is dequantized to, never the stored scales.

    Args:
        quantized: the weight, (out_features, in_features).
        bias: (out_features,) or None.
        compute_dtype: of the product; None for that of x.

    Attributes:
        of_conv1d: was it made of a `Conv1D`, which `to_linear` gives back?
        bytes_are_parameters: see `hold_bytes`.
    """

    of_conv1d = False
    bytes_are_parameters = False

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_compute_dtype(compute_dtype)
        self.compute_dtype = compute_dtype
        if len(quantized.shape) != 2:
            raise ValueError(f"the weight of a linear layer has two dimensions, not {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        self.dtype = quantized.dtype
        for name, tensor in tensors_by_name(quantized).items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._weight = quantized

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: QuantConfig | str | None = None, *others: Any, **settings: Any
    ) -> "QuantLinear":
        """Quantize the weight of `linear`, which stays as it is; other arguments as for `labkit.quantize`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantLinear.from_linear takes an nn.Linear, not {type(linear).__name__}")
        config = QuantConfig.of(config, *others, **settings)
        return cls(quantize(linear.weight, config), linear.bias, config.compute_dtype).train(linear.training)

    @property
    def weight(self) -> QuantizedTensor:
        """The 4-bit weight, made of the tensors held; the same object as long as they and the dtype stay."""
        last, held = self._weight, self._buffers
        if self.bytes_are_parameters:
            held = held | self._parameters
        tensors = tensors_by_name(last)
        if last.dtype is not self.dtype or any(held[name] is not t for name, t in tensors.items()):
            packed, *scales = (held[name] for name in tensors)
            again = NestedScales(*scales) if self.double_quant else scales[0]
            self._weight = replace(last, packed=packed, scales=again, dtype=self.dtype)
        return self._weight

    @property
    def codebook(self) -> str:
        return self._weight.codebook

    @property
    def blocksize(self) -> int:
        return self._weight.blocksize

    @property
    def double_quant(self) -> bool:
        return isinstance(self._weight.scales, NestedScales)

    def hold_bytes(self, as_parameters: bool) -> None:
        """Hold the uint8 tensors as frozen parameters, or as buffers again; nothing else changes.

        What divides a model among ranks divides its parameters, and leaves buffers whole. Scales in fp32 stay
        buffers: with the parameters, mixed precision would cast them.
        """
        tensors, self.bytes_are_parameters = tensors_by_name(self.weight), as_parameters
        for name, tensor in tensors.items():
            delattr(self, name)
            self.hold(name, tensor.data)
        self._weight = self.weight

    def hold(self, name: str, tensor: Tensor) -> None:
        """Register a tensor of the state in the way that `hold_bytes` chose."""
        if self.bytes_are_parameters and tensor.dtype == torch.uint8:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            TypeError: x is no tensor of floating numbers.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"x is {given}; a linear layer takes floating numbers, such as x.float(), or an embedding"
            )
        ordinary = is_ordinary(x)
        if ordinary and multiplies_directly(x, self.in_features, self.compute_dtype):
            return multiply_directly(x, self.weight, self.bias)
        dtype = self.compute_dtype or x.dtype
        if ordinary or is_traced(x):
            return _QuantizedLinear.apply(x, self.weight, self.bias, dtype)
        return multiply(x, self.weight.dequantize(dtype), self.bias, dtype)

    @classmethod
    def in_place_of(
        cls, layer: nn.Module, weight: QuantizedTensor, compute_dtype: torch.dtype | None
    ) -> "QuantLinear":
        """A layer with this weight, and with the bias, the mode and the kind of `layer`, linear or in 4 bits."""
        new = cls(weight, layer.bias, compute_dtype).train(layer.training)
        new.of_conv1d = layer.of_conv1d if isinstance(layer, QuantLinear) else kind_of(layer) == CONV1D
        return new

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dequantized layer, frozen: what this one computes, in 16 or 32 bits.

        An `nn.Linear`; of what was made of a `Conv1D`, a `Conv1D`, so that a model is saved as it was loaded.
        """
        weight = self.weight.dequantize(dtype)  # (out, in)
        linear: nn.Module
        if self.of_conv1d:
            from transformers.pytorch_utils import Conv1D

            linear, weight = Conv1D(self.out_features, self.in_features), weight.T.contiguous()
        else:
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def get_extra_state(self) -> Tensor:
        """How to read the tensors of the state; part of a `state_dict`."""
        return describe(self.weight)

    def set_extra_state(self, state: Any) -> None:
        """Nothing: it is read before the tensors are."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        shape = torch.Size((self.out_features, self.in_features))
        try:
            weight = read_weight(state_dict, prefix, shape)
        except ValueError as error:
            error_msgs.append(f"{error}. The layer is as it was")
            return
        if weight is not None:
            self.take_settings(weight, local_metadata.get("assign_to_params_buffers", False))
        args = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (
            prefix + DESCRIPTION in missing_keys
        ):  # from before there was one: it is of this layer if its tensors fit
            missing_keys.remove(prefix + DESCRIPTION)
        if prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is in full precision, and this layer is in 4 bits. Load it into the model first, and "
                "call quantize_model then"
            )

    def take_settings(self, weight: QuantizedTensor, assign: bool) -> None:
        """Become a layer that can hold `weight`: with its codebook and block size, and buffers of its shapes."""
        now, wanted, device = tensors_by_name(self.weight), tensors_by_name(weight), self.packed.device
        for name in now.keys() - wanted.keys():
            delattr(self, name)
        for name, tensor in wanted.items():
            if name not in now or now[name].shape != tensor.shape:
                self.hold(name, torch.empty_like(tensor, device=device))
        if assign:
            self.dtype = weight.dtype
        self._weight = weight

    def _apply(self, fn, recurse=True):
        # .half() would round the fp32 scales: keep them, and see on an empty tensor which dtype is asked for
        scales = {k: v for k, v in self._buffers.items() if v is not None and v.is_floating_point()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        super()._apply(fn, recurse)
        for name, before in scales.items():
            device = self._buffers[name].device
            self._buffers[name] = (
                torch.empty_like(before, device=device) if before.is_meta else before.to(device)
            )
        self._weight = self.weight  # lets go of the buffers as they were
        return self

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, {self.codebook}, blocksize={self.blocksize}"
        nested = ", double_quant" if self.double_quant else ""
        compute = f", compute_dtype={self.compute_dtype}" if self.compute_dtype else ""
        return f"{sizes}{nested}{compute}"
