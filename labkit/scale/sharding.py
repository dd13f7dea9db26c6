"""A QLoRA model divided among ranks by FSDP2: each keeps 1 / N of every parameter, and borrows the rest block by block.

    forward of a block     all-gather its parameters, compute, drop them
    backward of a block    all-gather them again, compute, drop them, reduce-scatter the gradients

Only *parameters* are divided. A 4-bit layer with its bytes in buffers stays whole on every rank, and nothing says
so. So `shard` first has each `QuantLinear` hold its bytes as frozen parameters. Backward still works: FSDP2 frees
and refills the *storage* of a gathered parameter, so what autograd kept is right.

FSDP1 divides only floating numbers, so there bytes are *called* bf16 (`stored_as`; bitsandbytes'
`bnb_4bit_quant_storage`). FSDP2 needs no such trick, and its mixed precision spoils it: it converts the "numbers".

No setting proves that a model is sharded: `check_sharded` looks at the model.

Sources: `torch/distributed/fsdp/_fully_shard`; bitsandbytes PR 970.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from labkit.lora.inject import lora_layers
from labkit.models.walk import unwrap
from labkit.quant.linear import QuantLinear
from labkit.quant.state import tensors_by_name


class NotSharded(RuntimeError):
    """A model that was to be divided among ranks is whole on each; the message says what it is instead."""


def block_names(model: nn.Module) -> list[str]:
    """The blocks of a model: the members of its largest `nn.ModuleList`.

    Raises:
        ValueError: there is none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no list of blocks to divide one by one; call "
            "torch.distributed.fsdp.fully_shard on the modules that should be gathered together"
        )
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{largest}.{i}" for i in range(len(lists[largest]))]


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    bytes_as_parameters: bool = True,
    policy: MixedPrecisionPolicy | None = None,
) -> nn.Module:
    """Divide `model` among all ranks with FSDP2, block by block, in place.

    Args:
        model: the same on each rank, adapted and quantized as it will be trained.
        mesh: of the ranks; by default all of them.
        bytes_as_parameters: divide 4-bit weights too; False shows what happens otherwise.
        policy: of FSDP2, for mixed precision.

    Returns:
        `model`, whose parameters are `DTensor`s now. Make the optimizer afterwards.

    Raises:
        NotSharded: what should be divided is whole.
        ValueError: the model has no blocks.
    """
    names = block_names(model)
    device = next(model.parameters()).device.type
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    if bytes_as_parameters:
        hold_bytes(model, as_parameters=True)
    settings = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for name in names:
        fully_shard(model.get_submodule(name), **settings)
    fully_shard(model, **settings)
    if bytes_as_parameters:
        check_sharded(model)
    return model


def hold_bytes(model: nn.Module, as_parameters: bool) -> None:
    """Have each `QuantLinear` of `model` hold its bytes as frozen parameters, or as buffers again."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.hold_bytes(as_parameters)


def kind_of(model: nn.Module) -> str:
    """What a model is, whatever was asked for: "FSDP2", "FSDP1", "DDP", or "a whole copy" on each rank."""
    modules = list(model.modules())
    if any(isinstance(module, FSDPModule) for module in modules):
        return "FSDP2"
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        return "FSDP1"
    return "DDP" if any(isinstance(m, DistributedDataParallel) for m in modules) else "a whole copy"


def check_sharded(model: nn.Module) -> None:
    """Look whether `model` is divided among the ranks: at its class and its tensors, not at a setting.

    Raises:
        NotSharded: it is not, or its 4-bit weights are whole.
    """
    kind = kind_of(model)
    total = sum(bytes_here(model).values())
    if not kind.startswith("FSDP"):
        raise NotSharded(
            f"this model was to be sharded, and is {kind} ({type(model).__name__}): every rank holds all {total:,} bytes. "
            "A launcher that finds no GPU may drop the setting without a word; call labkit.scale.shard yourself"
        )
    whole = [m for m in model.modules() if isinstance(m, QuantLinear) and not isinstance(m.packed, DTensor)]
    if whole and kind == "FSDP2" and dist.get_world_size() > 1:
        nbytes = sum(tensor.nbytes for m in whole for tensor in tensors_by_name(m.weight).values())
        raise NotSharded(
            f"{len(whole)} 4-bit layers keep their bytes in buffers, which FSDP2 leaves whole: {nbytes:,} of the {total:,} "
            "bytes on each rank. Call hold_bytes(model, as_parameters=True) before fully_shard, or use labkit.scale.shard"
        )


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> int:
    """Bytes of memory that this rank keeps for a tensor, padding included."""
    return local(tensor.detach()).untyped_storage().nbytes() if isinstance(tensor, DTensor) else tensor.nbytes


def bytes_here(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes on this rank between two steps, by what they are: "4 bits", "scales", "adapters", "others" and so on.

    Each tensor counts once. With an optimizer also "gradients" and "optimizer".
    """
    found: dict[str, int] = {}
    seen: set[int] = set()
    for kind, tensor in kinds(model, optimizer):
        # gradients of a group are parts of one message
        which = local(tensor.detach()).untyped_storage()._cdata if isinstance(tensor, DTensor) else id(tensor)
        if which not in seen:
            seen.add(which)
            found[kind] = found.get(kind, 0) + held(tensor)
    return found


def kinds(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with what it is."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            mine = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            for name, tensor in mine.items():
                yield {"packed": "4 bits", "bias": "others"}.get(name, "scales"), tensor
    for layer in lora_layers(model).values():
        yield from (("adapters", p) for p in layer.parameters(recurse=False))
    yield from (("others", tensor) for tensor in (*model.parameters(), *model.buffers()))
    if optimizer is not None:
        yield from (("gradients", p.grad) for p in model.parameters() if p.grad is not None)
        for state in optimizer.state.values():
            yield from (("optimizer", value) for value in state.values() if isinstance(value, Tensor))


def stored_as(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes under another dtype, as bitsandbytes' quant_storage: (n, 1) uint8 to (n / itemsize, 1).

    Raises:
        ValueError: the bytes are not a whole number of such numbers.

    >>> stored_as(torch.tensor([[0], [64], [128], [63]], dtype=torch.uint8), torch.float32)
    tensor([[1.0020]])
    """
    if packed.numel() % dtype.itemsize:
        raise ValueError(
            f"{packed.numel()} bytes are not a whole number of {dtype}; store them as torch.uint8"
        )
    return packed.view(-1).view(dtype).view(-1, 1)
