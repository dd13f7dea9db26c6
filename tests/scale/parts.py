"""What the ranks of the tests do: functions that other processes can import."""

import itertools
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from labkit import LoRAConfig, add_lora, models, quantize_model
from labkit.data.batches import Batch, collate
from labkit.data.encoding import encode_all
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.lora.inject import lora_layers
from labkit.memory.measurement import allocations
from labkit.memory.subjects import make_batch
from labkit.quant.linear import QuantLinear
from labkit.quant.scratch import use_scratch
from labkit.scale import (
    checkpoints,
    counting,
    data_parallel,
    sharding,
    sockets,
    tensor_parallel,
    traffic,
    world,
)
from labkit.training.loss import supervised_loss

STEPS, EXAMPLES = 3, 6


def tiny_qlora(bits: int = 4, r: int = 8, blocksize: int = 64) -> nn.Module:
    """The course's small base, quantized and adapted; the same on every call."""
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    if bits == 4:
        quantize_model(model, blocksize=blocksize, progress=False)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=r))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.01)  # so that both sides have a gradient at once
    return model.train()


def examples() -> list:
    """Encoded tickets, of unequal length."""
    _, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    chats = [ticket_chat(ticket)["messages"] for ticket in load_tickets("train")[: STEPS * EXAMPLES]]
    records = [{"prompt": chat[1]["content"], "completion": chat[2]["content"]} for chat in chats]
    return encode_all(records, tokenizer, 512)[0]


def batches(rank: int = 0, ranks: int = 1) -> list[Batch]:
    """The batch of each step; this rank's share."""
    found = examples()
    whole = [found[i : i + EXAMPLES] for i in range(0, len(found), EXAMPLES)]
    return [collate(data_parallel.share(step, rank, ranks), 0) for step in whole]


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train_shares(way: str, bits: int) -> dict:
    """Take some steps on this rank's shares; losses, adapters, and what was sent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny_qlora(bits)
    world.same_parameters(adapters(model))
    with counting.count_transfers() as beginning:
        if way != "written out":
            model = data_parallel.replicate(model, broadcast_buffers=way == "DDP with buffers")
    optimizer, losses, counts = optimizer_of(model), [], []
    for step, batch in enumerate(batches(rank, ranks)):
        world.at(step)
        with counting.count_transfers() as transfers:
            losses.append(data_parallel.take_step(model, batch, optimizer).loss)
        counts.append([(t.op, t.dtype, t.payload, t.sent) for t in transfers])
    buffers = sum(b.nbytes for b in model.buffers())
    return {
        "losses": losses,
        "adapters": adapters(model),
        "counts": counts,
        "beginning": counting.sent(beginning),
        "buffers": buffers,
    }


def socket_bytes(n: int) -> dict:
    """What the sockets of this rank send in an all-reduce of n fp32 numbers by gloo itself, in each of five."""
    tensor = torch.full((n,), float(dist.get_rank()))
    dist.all_reduce(tensor)  # connects
    sent = []
    for _ in range(5):
        dist.barrier()
        before = sockets.sent_by_sockets()
        dist.all_reduce(tensor)
        sent.append(sockets.sent_by_sockets() - before)
    return {"sent": sent, "first": float(tensor[0])}


def ring_and_gloo(n: int) -> dict:
    """Every collective of the counted group beside gloo's own, on the same numbers."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gloo = dist.new_group(backend="gloo")
    torch.manual_seed(rank)
    x = torch.randn(n)
    found = {}
    for op in ("SUM", "MAX", "MIN", "PRODUCT"):
        mine, theirs = x.clone(), x.clone()
        dist.all_reduce(mine, getattr(dist.ReduceOp, op))
        dist.all_reduce(theirs, getattr(dist.ReduceOp, op), group=gloo)
        found[op] = (mine, theirs)
    mean = x.clone()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    found["AVG"] = (mean, found["SUM"][1] / ranks)
    for name, group in (("mine", None), ("theirs", gloo)):
        out = torch.empty(n * ranks)
        dist.all_gather_single(out, x, group=group)
        found.setdefault("gather", []).append(out)
        sent = x.clone()
        dist.broadcast(sent, src=ranks - 1, group=group)
        found.setdefault("broadcast", []).append(sent)
        part = torch.empty(n)
        dist.reduce_scatter_single(part, torch.cat([x] * ranks), group=group)
        found.setdefault("scatter", []).append(part)
        objects = [None] * ranks
        dist.all_gather_object(objects, {"rank": rank}, group=group)
        found.setdefault(f"objects {name}", objects)
    return found


def die(how: str, step: int) -> None:
    """Take steps together, until rank 1 does not."""
    for now in range(4):
        world.at(now)
        if dist.get_rank() == 1 and now == step:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise FloatingPointError("the loss is NaN")
            if how == "sleeps":
                time.sleep(600)
            if how == "goes elsewhere":
                dist.broadcast(torch.ones(4), src=0)
                dist.barrier()
        dist.all_reduce(torch.ones(4))


def differ(what: str) -> None:
    """Compare code, data and seed, of which rank 1 has another."""
    other = what if dist.get_rank() == 1 else ""
    code = Path(__file__) if other == "code" else Path(world.__file__)
    world.check_same(code=code, data=[1, 2, 3 if other != "data" else 4], seed=0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which a rank has a part."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.detach().to_local().clone())
    return torch.cat(parts)


def whole_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def packed_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The codes of each 4-bit layer, all of them."""
    return {name: whole(m.packed) for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def train_sharded(bits: int, as_parameters: bool) -> dict:
    """Take some steps on this rank's shares of data and model."""
    model = tiny_qlora(bits)
    before = sharding.bytes_here(model)
    codes = packed_bytes(model)
    sharding.hold_bytes(model, as_parameters)
    groups = traffic.groups_of(model, sharding.block_names(model))
    sharding.shard(model, bytes_as_parameters=as_parameters)
    optimizer, losses, counts = optimizer_of(model), [], []
    after = sharding.bytes_here(model)
    refusal = ""
    try:
        sharding.check_sharded(model)
    except sharding.NotSharded as error:
        refusal = str(error)
    for step, batch in enumerate(batches(dist.get_rank(), dist.get_world_size())):
        world.at(step)
        with counting.count_transfers() as transfers:
            losses.append(data_parallel.take_step(model, batch, optimizer).loss)
        counts.append({op: counting.sent(transfers, op) for op in ("all_gather", "reduce_scatter")})
    trained = sharding.bytes_here(model, optimizer)
    same = all(torch.equal(codes[name], there) for name, there in packed_bytes(model).items())
    return {
        "losses": losses,
        "adapters": whole_adapters(model),
        "counts": counts,
        "groups": groups,
        "before": before,
        "after": after,
        "trained": trained,
        "refusal": refusal,
        "same codes": same,
    }


def shard_bitsandbytes() -> dict:
    """bytes on this rank of bitsandbytes' 4-bit parameters, whole and sharded, beside ours."""
    import bitsandbytes as bnb

    model, _ = models.load("tiny-llama", dtype=torch.float32)
    ours, _ = models.load("tiny-llama", dtype=torch.float32)
    quantize_model(ours, progress=False)
    for name in [name for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]:
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, False, torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        model.set_submodule(name, new.to("cpu"))
    add_lora(model, LoRAConfig(r=8))
    found = {"whole": uint8_bytes(model)}
    sharding.shard(model, bytes_as_parameters=False)
    found["sharded"] = uint8_bytes(model)
    sharding.hold_bytes(ours, as_parameters=True)
    sharding.shard(ours)
    return found | {"ours": sharding.bytes_here(ours)["4 bits"]}


def uint8_bytes(model: nn.Module) -> int:
    return sum(sharding.held(p) for p in model.parameters() if p.dtype == torch.uint8)


class Codes(nn.Module):
    """Bytes beside a weight that trains, as another library may hold them."""

    def __init__(self, codes: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.weight = nn.Parameter(torch.ones(64, 2, dtype=dtype))


def store_as_floats() -> dict:
    """Codes as uint8 and as bf16, in FSDP1 and in FSDP2 under mixed precision."""
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    floats = sharding.stored_as(codes, torch.bfloat16)
    found = {}
    for name, tensor in (("uint8", codes), ("bf16", floats)):
        try:
            made = FullyShardedDataParallel(
                Codes(tensor.clone(), torch.bfloat16), device_id=torch.device("cpu"), use_orig_params=True
            )
            found[f"FSDP1 {name}"] = sum(p.nbytes for p in made.parameters())
        except ValueError as error:
            found[f"FSDP1 {name}"] = str(error)
        model = Codes(tensor.clone(), torch.float32)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
        model.unshard()
        there = model.codes.detach()
        found[f"FSDP2 {name}"] = there.dtype == tensor.dtype and torch.equal(
            there.view(torch.uint8), tensor.view(torch.uint8)
        )
    return found


def ask_accelerate() -> dict:
    """What accelerate makes of a model when it is asked for FSDP on a CPU, and what a look at it says."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny_qlora())
    try:
        sharding.check_sharded(model)
    except sharding.NotSharded as error:
        return {"class": type(model).__name__, "kind": sharding.kind_of(model), "said": str(error)}
    return {"class": type(model).__name__, "kind": sharding.kind_of(model), "said": ""}


def adamw_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def sharded_run(folder: Path | None) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """A sharded model and its optimizer; those of the checkpoint, if one is given."""
    model = sharding.shard(tiny_qlora())
    optimizer = adamw_of(model)
    return model, optimizer, checkpoints.load_checkpoint(folder, model, optimizer)["step"] if folder else 0


def go_on(source: Path | None, target: Path, steps: int) -> dict:
    """Load a checkpoint, if there is one, take steps, write another; all that it holds, whole."""
    model, optimizer, done = sharded_run(source)
    loaded = (
        {name: whole(t) for name, t in checkpoints.tensors_of(model, optimizer).items()} if source else {}
    )
    for batch in batches(dist.get_rank(), dist.get_world_size())[done : done + steps]:
        data_parallel.take_step(model, batch, optimizer)
    checkpoints.save_checkpoint(target, model, optimizer, done + steps, {"seed": 0})
    written = {name: whole(t) for name, t in checkpoints.tensors_of(model, optimizer).items()}
    counts = {float(state["step"]) for state in optimizer.state.values()}
    return {"loaded": loaded, "written": written, "step": done, "counts": counts}


def die_while_saving(source: Path) -> None:
    """Load a checkpoint and write it again, in which rank 1 is killed on the way."""
    model, optimizer, _ = sharded_run(source)
    if dist.get_rank() == 1:
        checkpoints.dcp.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save_checkpoint(source, model, optimizer, 99)


def train_split(bits: int) -> dict:
    """A step of tensor parallelism: loss, gradients of this rank's parts, and what was sent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny_qlora(bits, blocksize=32)
    tensor_parallel.split(model)
    batch = batches()[0]
    with counting.count_transfers() as forth_and_back:
        loss = supervised_loss(model, batch) / batch.n_supervised
        loss.backward()
    with counting.count_transfers() as after:
        tensor_parallel.add_partial_gradients(model)
    parts = {name: m for name, m in model.named_modules() if isinstance(m, tensor_parallel.SlicedLoRA)}
    return {
        "loss": loss.item(),
        "grads": {
            f"{n}.{side}": getattr(m, side).grad for n, m in parts.items() for side in ("lora_A", "lora_B")
        },
        "columns": [name for name, m in parts.items() if isinstance(m, tensor_parallel.ColumnLoRA)],
        "whole": sum(getattr(m, m.whole).nbytes for m in parts.values()),
        "activations": counting.sent(forth_and_back),
        "gradients": counting.sent(after),
        "tokens": batch.ids.numel(),
        "place": (rank, ranks),
    }


def memory_of_a_step(way: str, length: int = 256) -> dict:
    """Bytes on this rank between steps, and the most that a step allocates above that."""
    model = tiny_qlora()
    model = sharding.shard(model) if way == "all" else data_parallel.replicate(model)
    optimizer = adamw_of(model)
    batch = make_batch(4096, 1, length)

    def step(phase=lambda name: None) -> None:
        phase("forward")
        loss = supervised_loss(model, batch) / batch.n_supervised
        phase("backward")
        loss.backward()
        phase("optimizer")
        optimizer.step()

    with use_scratch():
        for _ in range(2):
            step()
            gradients = sharding.bytes_here(model, optimizer)
            optimizer.zero_grad(set_to_none=True)
        changes, _ = allocations(step)
    static = sharding.bytes_here(model, optimizer)
    return {
        "with gradients": gradients,
        "static": static,
        "step": max(itertools.accumulate(changes, initial=0)),
    }
