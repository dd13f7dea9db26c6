"""CUDA's caching allocator without a GPU: what a step's tensors take of a card, and what lies unused between them.

PyTorch asks CUDA for *segments*, keeps them, and cuts *blocks* from them. So three numbers differ: what tensors
*requested*; their blocks, *allocated*; and the segments, *reserved*, which must fit. The rules:

- Sizes are rounded up to 512 bytes. Up to 1 MiB a block is cut from a segment of 2 MiB, below 10 MiB from one of
  20 MiB; a larger one gets a segment of its own, rounded up to 2 MiB.
- The smallest free block that is large enough is taken. What is too much is cut off; above 1 MiB only if that is
  more than 1 MiB: a layer of 21.5 MiB has a block of 22.
- A block that is freed is joined with free neighbours. A segment is kept.

Not here: cuBLAS's workspaces, what kernels take for themselves, and a card that is full.

Source: `c10/cuda/CUDACachingAllocator.cpp`.
"""

import bisect
from dataclasses import dataclass, field

from labkit.memory.tracker import TensorRecord, TrackedTensor

MIB = 1 << 20
SMALLEST = 512  # bytes that every size is a multiple of
SMALL = MIB  # largest size in the pool of small blocks
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # smallest size that gets a segment of its own
SEGMENT_ROUNDING = 2 * MIB
STEPS = 2  # in the second the optimizer's state is there from the start


@dataclass(eq=False)
class Block:
    """A piece of a segment.

    Attributes:
        size: its bytes; requested: those that its tensor asked for.
        is_free: does nobody use it?
        before, after: its neighbours in the segment.
    """

    size: int
    requested: int = 0
    is_free: bool = True
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)


@dataclass
class CachingAllocator:
    """The blocks of one card, and how many bytes of it were in use at most.

    Attributes:
        requested, allocated, reserved: bytes now.
        peak_requested, peak_allocated, peak_reserved: the most that each has been.
    """

    requested: int = 0
    allocated: int = 0
    reserved: int = 0
    peak_requested: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    pools: dict[bool, list[tuple[int, int, Block]]] = field(
        default_factory=lambda: {True: [], False: []}, repr=False
    )
    made: int = 0  # blocks so far: among free ones of a size, the oldest is taken

    def take(self, n: int) -> Block:
        """A block for a tensor of n bytes."""
        size = rounded(n, SMALLEST)
        is_small = size <= SMALL
        pool = self.pools[is_small]
        at = bisect.bisect_left(pool, (size,))
        block = pool.pop(at)[2] if at < len(pool) else self.segment(size)
        rest = block.size - size
        if rest >= SMALLEST if is_small else rest > SMALL:
            left = Block(rest, before=block, after=block.after)
            if block.after:
                block.after.before = left
            block.after, block.size = left, size
            self.offer(left, is_small)
        block.is_free, block.requested = False, n
        self.count(block, 1)
        return block

    def give_back(self, block: Block) -> None:
        """The tensor of this block is gone."""
        self.count(block, -1)
        is_small = rounded(block.requested, SMALLEST) <= SMALL
        if (after := block.after) and after.is_free:
            self.withdraw(after, is_small)
            block.size += after.size
            block.after = after.after
            if block.after:
                block.after.before = block
        if (before := block.before) and before.is_free:
            self.withdraw(before, is_small)
            before.size += block.size
            before.after = block.after
            if before.after:
                before.after.before = before
            block = before
        self.offer(block, is_small)

    def segment(self, size: int) -> Block:
        """New memory from CUDA, at least `size` bytes of it."""
        if size <= SMALL:
            n = SMALL_SEGMENT
        else:
            n = LARGE_SEGMENT if size < OWN_SEGMENT else rounded(size, SEGMENT_ROUNDING)
        self.reserved += n
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(n)

    def offer(self, block: Block, is_small: bool) -> None:
        """Put a free block into its pool."""
        self.made += 1
        block.is_free = True
        bisect.insort(self.pools[is_small], (block.size, self.made, block))

    def withdraw(self, block: Block, is_small: bool) -> None:
        """Take a free block out of its pool, to join it with a neighbour."""
        pool = self.pools[is_small]
        at = bisect.bisect_left(pool, (block.size,))
        while pool[at][2] is not block:
            at += 1
        del pool[at]

    def count(self, block: Block, sign: int) -> None:
        """A block comes into use, or goes out of it."""
        self.requested += sign * block.requested
        self.allocated += sign * block.size
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)


def block_bytes(n: int) -> int:
    """Bytes of the block of a tensor of n bytes, if it is cut from new memory.

    >>> block_bytes(22_544_384) - 22_544_384  # 21.5 MiB of 22
    524288
    """
    size = rounded(n, SMALLEST)
    whole = rounded(size, SEGMENT_ROUNDING)
    return whole if size >= OWN_SEGMENT and whole - size <= SMALL else size


def rounded(n: int, multiple: int) -> int:
    """n, rounded up to a multiple.

    >>> rounded(1, 512), rounded(1024, 512)
    (512, 1024)
    """
    return -(-n // multiple) * multiple


def replay(record: TensorRecord) -> CachingAllocator:
    """Take and give back the blocks of a recorded step, two times over, as in the first two steps of a run.

    The optimizer makes its state at the end of the first, in what activations have left.
    """
    allocator = CachingAllocator()
    first = min(event for _, event in record.starts)
    static = [tensor for tensor in record.tensors if tensor.born <= first]
    moving = [tensor for tensor in record.tensors if tensor.born > first]
    for tensor in static:
        if not is_state(tensor):
            allocator.take(tensor.bytes)
    for step in range(STEPS):
        play(allocator, moving)
        for tensor in static:
            if step == 0 and is_state(tensor):
                allocator.take(tensor.bytes)
    return allocator


def is_state(tensor: TrackedTensor) -> bool:
    """Is it the optimizer's?"""
    return tensor.label.startswith("optimizer/")


def play(allocator: CachingAllocator, tensors: list[TrackedTensor]) -> None:
    """One step: tensors come and go in the order of their events, and those that have stayed go at its end."""
    events = [(t.born, t) for t in tensors] + [(t.died, t) for t in tensors if t.died is not None]
    blocks: dict[int, Block] = {}
    for event, tensor in sorted(events, key=lambda pair: pair[0]):
        if event == tensor.born:
            blocks[id(tensor)] = allocator.take(tensor.bytes)
        else:
            allocator.give_back(blocks.pop(id(tensor)))
    for block in blocks.values():
        allocator.give_back(block)
