"""A GPU, simulated on the CPU: what a missing wait breaks on a real one, breaks here too.

Tensors on the "device" are ordinary CPU tensors, in memory that the simulator owns. An operation on them is not
carried out but queued on the current stream (`tests.optim.streams`). Memory is treated as PyTorch's allocators
treat it: what is freed goes back to the stream on which it was allocated, and is overwritten in that stream's
order, however many operations of other streams are still queued for it. `record_stream` puts that off, as do
non-blocking copies of pinned memory.
"""

import contextlib
import ctypes
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.optim.streams import Event, Point, Schedule, Scheduler, Stream

POISON = 0x7F  # in every byte: 3.4e38 as a float


@dataclass(eq=False)
class Block:
    """A piece of memory; `bytes` is a view that does not keep a user's tensors alive."""

    pinned: bool
    stream: Stream
    buffer: bytearray
    bytes: Tensor
    used_on: set[Stream] = field(default_factory=set)


class Gpu(TorchDispatchMode):
    """The simulator. `with gpu:` operations on its tensors are queued.

    Attributes:
        current: the stream on which operations are queued.
        capturing: is a CUDA graph being captured?
    """

    def __init__(self, schedule: Schedule, seed: int = 0):
        super().__init__()
        self.scheduler = Scheduler(schedule, seed)
        self.current = self.stream()
        self.blocks: dict[int, Block] = {}  # in use, by address
        self.free: dict[tuple[bool, Stream | None, int], list[Block]] = defaultdict(list)
        self.in_limbo: list[tuple[Block, list[Point]]] = []  # freed, and still used by other streams
        self.busy, self.capturing = False, False

    # --- streams

    def stream(self) -> Stream:
        """Another one, for what a user computes."""
        return self.scheduler.stream(computing=True)

    def push(self, operation, stream: Stream | None = None) -> None:
        """Queue an operation, on the current stream if not on another."""

        def carry_out():
            with self.carrying_out():
                operation()

        (stream or self.current).push(carry_out)

    def synchronize(self) -> None:
        self.scheduler.synchronize()

    @contextlib.contextmanager
    def carrying_out(self):
        """What PyTorch does meanwhile is not queued."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    @contextlib.contextmanager
    def on(self, stream: Stream):
        """What `torch.cuda.stream` does."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    # --- memory

    def allocate(self, nbytes: int, pinned: bool = False) -> Tensor:
        """(nbytes,) uint8; what was freed last comes first, with what is in it."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        for block, points in list(self.in_limbo):
            if all(point.is_past() for point in points):
                self.in_limbo.remove((block, points))
                self.reuse(block)
        place = (pinned, None if pinned else self.current, nbytes)
        if self.free[place]:
            block = self.free[place].pop()
        else:
            buffer = bytearray([POISON]) * nbytes
            block = Block(pinned, self.current, buffer, torch.frombuffer(buffer, dtype=torch.uint8))
        handle = (ctypes.c_char * nbytes).from_buffer(block.buffer)  # lives as long as the tensor
        weakref.finalize(handle, self.freed, block).atexit = False
        self.blocks[block.bytes.data_ptr()] = block
        return torch.frombuffer(handle, dtype=torch.uint8)

    def freed(self, block: Block) -> None:
        """No tensor refers to the block any more."""
        del self.blocks[block.bytes.data_ptr()]
        points = [stream.now() for stream in block.used_on]
        block.used_on = set()
        if points:
            self.in_limbo.append((block, points))
        else:
            self.reuse(block)

    def reuse(self, block: Block) -> None:
        """Overwrite a block: the host does that at once, the GPU in the order of the stream."""
        self.free[block.pinned, None if block.pinned else block.stream, len(block.buffer)].append(block)
        if block.pinned:
            with self.carrying_out():
                block.bytes.fill_(POISON)
        else:
            self.push(lambda: block.bytes.fill_(POISON), block.stream)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        block = self.block_of(tensor)
        if block is not None and block.stream is not stream:
            block.used_on.add(stream)

    def block_of(self, tensor: Tensor) -> Block | None:
        return self.blocks.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None

    def inside(self, value: Any) -> Any:
        """A tensor as operations see it: without keeping its memory alive. A host tensor is taken as it is now."""
        if not isinstance(value, Tensor):
            return value
        block = self.block_of(value)
        if block is None:
            return value.detach().clone() if value.numel() else value.detach()
        start = value.storage_offset() * value.itemsize
        whole = block.bytes[start : start + (len(block.buffer) - start) // value.itemsize * value.itemsize]
        return whole.view(value.dtype).as_strided(value.shape, value.stride())

    def put(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        made = self.like(tensor)
        destination, source = self.inside(made), tensor.detach().clone()
        self.push(lambda: destination.copy_(source))
        return made

    def like(self, tensor: Tensor) -> Tensor:
        """Memory of the same layout on the device."""
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
        flat = self.allocate(extent * tensor.itemsize)
        return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def read(self, tensor: Tensor) -> Tensor:
        """What the host sees of a tensor."""
        self.current.synchronize()
        with self.carrying_out():
            return self.inside(tensor).clone()

    # --- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        blocks = [block for t in given if (block := self.block_of(t))]
        if self.busy or func.is_view or all(block.pinned for block in blocks):
            return func(*args, **kwargs)
        inside = tree_map(self.inside, (args, kwargs))
        if func._schema.is_mutable:
            return self.change(func, args, kwargs, inside, blocks)
        try:
            without_numbers = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, inside)
            shapes = func(*without_numbers[0], **without_numbers[1])
        except (RuntimeError, NotImplementedError):
            shapes = None
        if not isinstance(shapes, Tensor):  # a number, or a shape that depends on numbers: the host waits
            self.current.synchronize()
            with self.carrying_out():
                result = func(*inside[0], **inside[1])
            return tree_map(lambda v: self.put(v) if isinstance(v, Tensor) else v, result)
        if kwargs.get("device") == torch.device("meta"):
            return shapes
        result = self.like(shapes)
        destination = self.inside(result)
        self.push(lambda: destination.copy_(func(*inside[0], **inside[1])))
        return result

    def change(self, func, args, kwargs, inside, blocks: list[Block]) -> Any:
        """An operation in place; a copy that is not asked to be non-blocking makes the host wait."""
        written = [
            value for value, a in zip(args, func._schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        on_host = any(self.block_of(t) is None for t in tree_leaves(written) if t.numel())
        if on_host:
            self.current.synchronize()
            outside = tree_map(
                lambda v: self.inside(v) if isinstance(v, Tensor) and self.block_of(v) else v, args
            )
            with self.carrying_out():
                func(*outside, **kwargs)
            return written[0]
        self.push(lambda: func(*inside[0], **inside[1]))
        pinned = [block for block in blocks if block.pinned]
        if pinned and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            self.current.synchronize()
        for block in pinned:  # as PyTorch's copy tells the allocator of pinned memory
            block.used_on.add(self.current)
        return written[0] if len(func._schema.returns) else None


class SimulatedTorch:
    """`torch`, as a module sees it that runs on the simulated GPU."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.cuda = gpu, SimulatedCuda(gpu)

        self._C = SimpleNamespace(_host_emptyCache=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, nbytes: int, dtype=None, device=None, pin_memory: bool = False) -> Tensor:
        return self.gpu.allocate(nbytes, pin_memory)


class SimulatedCuda:
    """`torch.cuda`."""

    Event = Event

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def Stream(self, device) -> Stream:  # torch's name
        return self.gpu.scheduler.stream()

    def current_stream(self, device) -> Stream:
        return self.gpu.current

    def stream(self, stream: Stream):
        return self.gpu.on(stream)

    def is_current_stream_capturing(self) -> bool:
        return self.gpu.capturing
