"""A process group that counts every byte between ranks, where DDP, FSDP and everything else can be run on it.

It carries out the collectives itself, on a ring (`labkit.scale.ring`), with nothing but send and receive from gloo
under it. So what is counted is not a formula: it is the length of each message, when it is sent. To PyTorch it is a
backend like any other, `init_process_group("counted")`.

What the count leaves out is how the messages are wrapped: gloo puts 48 bytes before each, TCP and IP theirs.
`labkit.scale.sockets` reads from the system what its sockets have sent, as a witness for groups that count
nothing.

Source: `torch.distributed.Backend.register_backend`.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from labkit.scale import ring

COUNTED = "counted"  # the backend's name
TAG = 7  # of the ring's messages


@dataclass(frozen=True)
class Transfer:
    """One collective, as one rank saw it.

    Attributes:
        op: "all_reduce", "all_gather", "reduce_scatter", "broadcast" …
        dtype: of what was passed.
        payload: bytes of the whole tensor, of all pieces together.
        sent: bytes that this rank sent.
        seconds: how long it took, waiting for the others included.
    """

    op: str
    dtype: str
    payload: int
    sent: int
    seconds: float


class CountedGroup(dist.ProcessGroup):
    """The collectives on a ring of gloo's sends and receives; `transfers` is the list of all of them."""

    def __init__(self, options: Any, _: Any = None):
        super().__init__(options.group_rank, options.group_size)
        self.number, self.ranks = options.group_rank, options.group_size
        self.carrier = dist.ProcessGroupGloo(options.store, self.number, self.ranks, options.timeout)
        self.name = options.group_id
        self.transfers: list[Transfer] = []
        self.sent = 0

    # ----- messages

    def send_to(self, tensor: Tensor, rank: int) -> Any:
        """Send a contiguous tensor, and count it; returns what to wait for."""
        self.sent += tensor.nbytes
        return self.carrier.send([tensor], rank, TAG)

    def receive_from(self, tensor: Tensor, rank: int) -> None:
        """Fill a contiguous tensor."""
        self.carrier.recv([tensor], rank, TAG).wait()

    def exchange(self, give: Tensor, take: Tensor) -> None:
        """Send to the next rank on the ring while receiving from the one before."""
        going = self.send_to(give, (self.number + 1) % self.ranks) if give.numel() else None
        if take.numel():
            self.receive_from(take, (self.number - 1) % self.ranks)
        if going is not None:
            going.wait()

    @contextmanager
    def recorded(self, op: str, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Within the block one collective is carried out, on these tensors."""
        whole, before, started = list(tensors), self.sent, time.perf_counter()
        yield
        dtype = str(whole[0].dtype).removeprefix("torch.") if whole else ""
        payload, took = sum(t.nbytes for t in whole), time.perf_counter() - started
        self.transfers.append(Transfer(op, dtype, payload, self.sent - before, took))

    # ----- collectives, by PyTorch's names

    def allreduce(self, tensors, opts=None):
        op = name_of(opts.reduceOp) if opts is not None else "SUM"
        with self.recorded("all_reduce", tensors):
            for tensor in tensors:
                whole = tensor.contiguous()
                ring.all_reduce(whole, self.number, self.ranks, self.exchange, op)
                if whole is not tensor:
                    tensor.copy_(whole)
        return done(tensors)

    def allreduce_coalesced(self, tensors, opts=None):
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors, opts=None):
        root = opts.rootRank if opts is not None else 0
        place = (self.number - root) % self.ranks  # in a chain that begins with the root
        with self.recorded("broadcast", tensors):
            for tensor in tensors:
                whole = tensor.contiguous()
                if place:
                    self.receive_from(whole, (self.number - 1) % self.ranks)
                if place < self.ranks - 1:
                    self.send_to(whole, (self.number + 1) % self.ranks).wait()
                if whole is not tensor:
                    tensor.copy_(whole)
        return done(tensors)

    def allgather(self, outputs, inputs, opts=None):
        with self.recorded("all_gather", outputs[0]):
            pieces = [out.contiguous() for out in outputs[0]]
            pieces[self.number].copy_(inputs[0])
            ring.all_gather(pieces, self.number, self.exchange)
            for out, piece in zip(outputs[0], pieces):
                if out is not piece:
                    out.copy_(piece)
        return done(outputs)

    def all_gather_single(self, output, mine, opts=None):
        with self.recorded("all_gather", [output]):
            pieces = output.view(-1).tensor_split(self.ranks)
            if pieces[self.number].data_ptr() != mine.data_ptr():  # FSDP2 gathers in place
                pieces[self.number].copy_(mine.reshape(-1))
            ring.all_gather(pieces, self.number, self.exchange)
        return done(output)

    def reduce_scatter(self, outputs, inputs, opts=None):
        op = name_of(opts.reduceOp) if opts is not None else "SUM"
        with self.recorded("reduce_scatter", inputs[0]):
            pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in inputs[0]]
            ring.reduce_scatter(pieces, self.number, self.exchange, op)
            outputs[0].copy_(pieces[self.number])
        return done(outputs)

    def reduce_scatter_single(self, output, whole, opts=None):
        pieces = whole.reshape(-1).tensor_split(self.ranks)
        return self.reduce_scatter([output.view(-1)], [pieces], opts)

    _allgather_base, _reduce_scatter_base = (
        all_gather_single,
        reduce_scatter_single,
    )  # their names before 2.13

    def gather(self, outputs, inputs, opts=None):
        root = opts.rootRank if opts is not None else 0
        with self.recorded("gather", inputs):
            if self.number != root:
                self.send_to(inputs[0].contiguous(), root).wait()
            for rank, out in enumerate(outputs[0] if self.number == root else ()):
                if rank == root:
                    out.copy_(inputs[0])
                else:
                    self.receive_from(out, rank)
        return done(outputs)

    def scatter(self, outputs, inputs, opts=None):
        root = opts.rootRank if opts is not None else 0
        with self.recorded("scatter", outputs):
            if self.number != root:
                self.receive_from(outputs[0], root)
            for rank, piece in enumerate(inputs[0] if self.number == root else ()):
                if rank == root:
                    outputs[0].copy_(piece)
                else:
                    self.send_to(piece.contiguous(), rank).wait()
        return done(outputs)

    def barrier(self, opts=None):
        with self.recorded("barrier", ()):
            self.carrier.barrier().wait()
        return done([])

    def getBackendName(self):
        return COUNTED

    @property
    def group_name(self):
        return self.name

    @property
    def group_desc(self):
        return COUNTED


def name_of(op: Any) -> str:
    """ "SUM", "AVG" …

    Raises:
        NotImplementedError: the ring cannot add in that way.
    """
    for name in ring.ADD:
        if op == getattr(dist.ReduceOp, name):
            return name
    raise NotImplementedError(f"the counted group reduces by {', '.join(ring.ADD)}, not by {op}")


def done(value: Any) -> Any:
    """What a collective returns: work that is finished already."""
    future: Future = Future()
    future.set_result(value)
    return _create_work_from_future(future)


def register() -> None:
    """Make the backend known to PyTorch in this process."""
    if COUNTED.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(COUNTED, CountedGroup, extended_api=True, devices=["cpu"])


def counted_group() -> CountedGroup:
    """The group of all ranks.

    Raises:
        RuntimeError: it is not one that counts.
    """
    group = dist.group.WORLD
    if not isinstance(group, CountedGroup):
        raise RuntimeError(
            f"the ranks talk through {dist.get_backend()}, which does not count; start them with counted=True"
        )
    return group


@contextmanager
def count_transfers() -> Iterator[list[Transfer]]:
    """Within the block the list fills with what this rank takes part in; complete afterwards."""
    group = counted_group()
    found: list[Transfer] = []
    first = len(group.transfers)
    try:
        yield found
    finally:
        found.extend(group.transfers[first:])


def sent(transfers: Iterable[Transfer], op: str | None = None) -> int:
    """Bytes that this rank sent, in all or in one kind of collective."""
    return sum(transfer.sent for transfer in transfers if op in (None, transfer.op))
