"""A layer divided among ranks, with its adapter, in both layouts.

    column   W = [W_1; W_2; …]   a rank makes some of the outputs     y_r = W_r x + s B_r A x
    row      W = [W_1, W_2, …]   a rank reads some of the inputs      y = sum over r of (W_r x_r + s B A_r x_r)

A pair (gate/up and down, q/k/v and o) needs one sum over the ranks forward and one backward. The adapter is cut
where its weight is: B with the outputs, A with the inputs. Its other half is whole on each rank and gets a part of
its gradient there; those are added up once a step. Activations carry nothing extra.

A 4-bit weight is cut between blocks, so its numbers are those of the whole; its scales are kept in fp32.

Source: Megatron-LM (Shoeybi et al. 2019), section 3.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.lora.inject import lora_layers
from labkit.lora.layer import LoRALinear
from labkit.models.surgery import swap_modules
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor
from labkit.scale.data_parallel import add_gradients

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")  # whose output every column layer of a block reads


class ToRanks(torch.autograd.Function):
    """What all ranks read: itself forward, the sum of the ranks' gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class FromRanks(torch.autograd.Function):
    """What all ranks make together: the sum forward, its gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.contiguous().clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SlicedLoRA(nn.Module):
    """A rank's part of a `LoRALinear`; its parameters are named alike.

    Attributes:
        whole: the name of the half that every rank has, and whose gradient it has a part of.
    """

    whole: str

    def __init__(self, layer: LoRALinear, rank: int, ranks: int, outputs: bool):
        super().__init__()
        check_divisible(layer, ranks, outputs)
        rows = piece(layer.out_features, rank, ranks) if outputs else slice(None)
        columns = slice(None) if outputs else piece(layer.in_features, rank, ranks)
        base = layer.base
        self.scaling, self.bias = layer.scaling, base.bias
        if isinstance(base, QuantLinear):
            self.base: nn.Module = QuantLinear(cut(base.weight, rows, columns), None, base.compute_dtype)
        else:
            weight = base.weight.detach()[rows, columns].clone()
            self.base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self.base.weight = nn.Parameter(weight, requires_grad=False)
        if outputs and self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach()[rows].clone(), requires_grad=False)
        self.lora_A = nn.Parameter(layer.lora_A.detach()[:, columns].clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach()[rows].clone())

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of the output, without the bias."""
        z = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r)
        y = self.base(x)
        return y + (self.scaling * F.linear(z, self.lora_B)).to(y.dtype)


class ColumnLoRA(SlicedLoRA):
    """(..., in) to (..., out / N): the rank's outputs, of an x that went through `ToRanks`."""

    whole = "lora_A"

    def __init__(self, layer: LoRALinear, rank: int, ranks: int):
        super().__init__(layer, rank, ranks, outputs=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y if self.bias is None else y + self.bias


class RowLoRA(SlicedLoRA):
    """(..., in / N) to (..., out): the rank's inputs, and the sum over all ranks."""

    whole = "lora_B"

    def __init__(self, layer: LoRALinear, rank: int, ranks: int):
        super().__init__(layer, rank, ranks, outputs=False)

    def forward(self, x: Tensor) -> Tensor:
        y = FromRanks.apply(self.part(x))
        return y if self.bias is None else y + self.bias  # once, not once per rank


def check_divisible(layer: LoRALinear, ranks: int, outputs: bool) -> None:
    """Raise a `ValueError` unless `layer` can be cut into so many equal parts.

    Raises:
        ValueError: it has dropout or is another kind of adapter, or its width is not divisible.
    """
    if type(layer) is not LoRALinear or layer.is_merged or layer.has_own_base:
        raise ValueError(
            f"a {type(layer).__name__} that is merged, DoRA or starts from its weight cannot be cut; use plain LoRA"
        )
    if layer.dropout.p:
        raise ValueError(
            f"dropout={layer.dropout.p} would drop other inputs on each rank; train with dropout=0 under tensor parallelism"
        )
    width, side = (layer.out_features, "outputs") if outputs else (layer.in_features, "inputs")
    if width % ranks:
        raise ValueError(
            f"{width} {side} cannot be divided among {ranks} ranks; choose a number that divides {width}"
        )


def piece(width: int, rank: int, ranks: int) -> slice:
    """The rank's part of `width` outputs or inputs."""
    return slice(rank * width // ranks, (rank + 1) * width // ranks)


def cut(weight: QuantizedTensor, rows: slice, columns: slice) -> QuantizedTensor:
    """Part of a 4-bit weight (out, in), with the very numbers of the whole.

    Raises:
        ValueError: the cut goes through a block.
    """
    height, width = weight.shape
    size = weight.blocksize
    first, last, _ = columns.indices(width)
    if width % size or first % size or last % size:
        raise ValueError(
            f"columns {first} to {last} of {width} cut through a block of {size} weights; quantize with a smaller "
            "blocksize, or use fewer ranks"
        )
    packed = weight.packed.view(height, width // 2)[rows, first // 2 : last // 2]
    absmax = weight.absmax.view(height, width // size)[rows, first // size : last // size]
    shape = torch.Size((packed.shape[0], last - first))
    packed, absmax = packed.reshape(-1, 1).clone(), absmax.reshape(-1).clone()
    return QuantizedTensor(packed, absmax, shape, weight.dtype, weight.codebook, size)


def split(model: nn.Module) -> nn.Module:
    """Divide the adapted layers of a Llama-like model among all ranks, in place; each keeps its heads.

    Args:
        model: the same on each rank, with LoRA on all its linear layers.

    Returns:
        `model`. After each backward pass, `add_partial_gradients` completes what each rank has a part of.

    Raises:
        ValueError: a layer cannot be divided, has no adapter, or is none that is known. Nothing is changed then.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heads = model.config.num_key_value_heads
    if heads % ranks:
        raise ValueError(
            f"{heads} heads of keys and values cannot be divided among {ranks} ranks; use {heads} or fewer"
        )
    layers = lora_layers(model)
    new: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        last = name.rpartition(".")[2]
        if last not in (*COLUMN, *ROW):
            raise ValueError(f"{name} is none of {', '.join((*COLUMN, *ROW))}, whose layouts are known")
        new[name] = (ColumnLoRA if last in COLUMN else RowLoRA)(layer, rank, ranks)
    blocks = {name.rpartition(".")[0].rpartition(".")[0] for name in new}
    if len(new) != len(blocks) * len((*COLUMN, *ROW)):
        raise ValueError(
            "some layers have no adapter, and would stay whole beside those that are cut; adapt all-linear"
        )
    swap_modules(model, new)
    for block in blocks:
        for norm in NORMS:
            model.get_submodule(f"{block}.{norm}").register_forward_hook(to_ranks)
    return model


def to_ranks(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    """A forward hook: all ranks read this output."""
    return ToRanks.apply(output)


def add_partial_gradients(model: nn.Module) -> None:
    """Add up the gradients of the halves that every rank has, in one message."""
    sliced = [module for module in model.modules() if isinstance(module, SlicedLoRA)]
    add_gradients(getattr(module, module.whole) for module in sliced)
