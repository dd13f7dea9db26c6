"""The ledger of one rank of several: what is divided by N, what stays whole, what is borrowed for a moment.

    shard          weights   adapters   gradients   optimizer      called
    None           whole     whole      whole       whole          data parallel, DDP
    "optimizer"    whole     whole      whole       / N            ZeRO-1
    "gradients"    whole     whole      / N         / N            ZeRO-2
    "all"          / N       / N        / N         / N            ZeRO-3, FSDP

Of LoRA's memory, gradients and moments are a few per cent: the first two have little to divide, and "all" nearly
everything. What comes on top there: a block is gathered to be computed with, while the next is on its way, and the
root (embeddings, norm, output layer) stays gathered from its forward to its backward pass. What FSDP2 cannot divide
stays whole: buffers, and of a 4-bit layer the scales in fp32.

Sources: ZeRO (Rajbhandari et al. 2020), section 5; `torch/distributed/fsdp/_fully_shard`; held to two ranks by
`tests/scale/test_ledger.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from labkit.checks import check_choice, check_whole
from labkit.memory.counting import ModelTensors, constants_bytes, gradient_width, state_tensors
from labkit.memory.ledger import Ledger, LedgerRow
from labkit.memory.setup import Setup, itemsize

SHARDS = (None, "optimizer", "gradients", "all")
OFFLOADED = (
    "weights",
    "lora",
    "gradients",
    "optimizer",
)  # scales, of which a part is divided, count as staying
ON_ITS_WAY = 2  # blocks that are there at once: one in use, one being gathered
SOURCE = "labkit.memory.sharing"


@dataclass(frozen=True)
class Sharing:
    """How a step is shared among ranks.

    Args:
        ranks: how many.
        shard: what each keeps only its part of, one of `SHARDS`.
        offload: keep a rank's part of weights, gradients and moments in its host's memory; only with shard="all".

    Raises:
        ValueError: a value is not allowed, or the two do not go together.
    """

    ranks: int = 1
    shard: str | None = None
    offload: bool = False

    def __post_init__(self):
        check_whole("ranks", self.ranks, usual="one per GPU")
        check_choice("shard", self.shard, SHARDS)
        check_choice("offload", self.offload, (True, False))
        if self.offload and self.shard != "all":
            raise ValueError(
                f"offload=True keeps what is sharded, and shard={self.shard!r}; give shard='all'"
            )

    def part(self, n: int) -> int:
        """A rank's part of n, padded."""
        return math.ceil(n / self.ranks)

    def describe(self) -> str:
        how = {None: "whole on each", "all": "all sharded"}.get(self.shard, f"{self.shard} sharded")
        return f"one of {self.ranks} ranks, {how}{', offloaded' if self.offload else ''}"


def share(ledger: Ledger, tensors: ModelTensors, setup: Setup, sharing: Sharing) -> Ledger:
    """The ledger of one rank, made of that of one process which does the same step on its own."""
    if sharing.ranks == 1 and not sharing.offload:
        return ledger
    rows = [divided(row, tensors, setup, sharing) for row in ledger.rows]
    counts = dict(ledger.counts)
    if sharing.offload:
        moved = [row for row in rows if row.component in OFFLOADED and row.kind != "buffers"]
        counts["host_bytes"] = sum(row.bytes for row in moved)
        rows = [replace(row, bytes=0, at_peak=0) if row in moved else row for row in rows]
    rows += borrowed(tensors, setup, sharing)
    settings = ledger.settings | {"ranks": sharing.ranks, "shard": sharing.shard, "offload": sharing.offload}
    title = ledger.title.replace(" (plan)", f", {sharing.describe()} (plan)")
    return replace(ledger, rows=rows, title=title, settings=settings, counts=counts)


def divided(row: LedgerRow, tensors: ModelTensors, setup: Setup, sharing: Sharing) -> LedgerRow:
    """A row with a rank's part of it, if `sharing` divides it."""
    part: Callable[[int], int] = sharing.part
    trained = tensors.trained(setup).values()
    plain = {n: m for n, m in tensors.parameters.items() if n not in tensors.quantized}
    quantized = [tensors.parameters[name] for name in tensors.quantized]
    everything, width = sharing.shard == "all", setup.width
    if row.component == "optimizer" and sharing.shard is not None:
        return resized(row, sum(sum(state_tensors(part(n), dtype, setup)) for n, dtype in trained), sharing)
    if row.component == "gradients" and sharing.shard in ("gradients", "all"):
        return resized(row, sum(part(n) * gradient_width(dtype, setup) for n, dtype in trained), sharing)
    if not everything:
        return row
    if row.component == "lora":
        adapters = tensors.adapters(setup).values()
        return resized(row, sum(map(part, adapters)) * itemsize(setup.adapter_dtype), sharing)
    if row.component == "constants" and setup.double_quant:
        return resized(row, sum(scales_here(n, setup, sharing) for n in quantized), sharing)
    if row.component == "weights" and row.kind == "4 bits":
        return resized(row, sum(part(math.ceil(n / 2)) for n in quantized), sharing)
    if row.component == "weights" and row.kind != "buffers":
        ends = row.kind.startswith("embeddings")
        return resized(
            row,
            width * sum(part(n) for name, n in plain.items() if (name in tensors.embeddings) == ends),
            sharing,
        )
    return row


def resized(row: LedgerRow, n: int, sharing: Sharing) -> LedgerRow:
    """The row with n bytes, and as large a share of them at the peak as before."""
    at_peak = round(n * row.at_peak / row.bytes) if row.bytes else 0
    return replace(row, bytes=n, at_peak=at_peak, formula=f"1 / {sharing.ranks} of: {row.formula}")


def scales_here(n: int, setup: Setup, sharing: Sharing) -> int:
    """Bytes on a rank of the scales of a 4-bit weight of n numbers: the 8-bit ones are divided, those in fp32 are not."""
    codes = math.ceil(n / setup.blocksize)
    return constants_bytes(n, setup) - codes + sharing.part(codes)


def borrowed(tensors: ModelTensors, setup: Setup, sharing: Sharing) -> list[LedgerRow]:
    """What a rank has only for a while: gathered blocks and root, or the buckets in which DDP sends gradients."""
    if sharing.ranks == 1:
        return []
    gradients = sum(n * gradient_width(dtype, setup) for n, dtype in tensors.trained(setup).values())
    if sharing.shard != "all":
        formula = "a copy of the gradients, in the buckets that are sent"
        return [LedgerRow("gradients", "buckets", gradients, gradients, formula, "torch.nn.parallel")]
    blocks, root = gathered(tensors, setup)
    largest = max(blocks.values(), default=0)
    there = min(ON_ITS_WAY, len(blocks)) * largest
    own = math.ceil(gradients / max(1, len(blocks)))
    return [
        LedgerRow("temporary", "gathered blocks", there, there, "the block in use, and the next", SOURCE),
        LedgerRow("temporary", "gathered root", root, root, "embeddings, norm, output layer", SOURCE),
        LedgerRow("temporary", "gradients of a block", own, own, "before they are divided", SOURCE),
    ]


def gathered(tensors: ModelTensors, setup: Setup) -> tuple[dict[int, int], int]:
    """Bytes of each block when it is gathered, by its number, and of what is outside the blocks."""
    sizes = {name: n * setup.width for name, n in tensors.parameters.items() if name not in tensors.quantized}
    for name in tensors.quantized:
        n = tensors.parameters[name]
        codes = math.ceil(n / setup.blocksize) if setup.double_quant else 0
        sizes[name] = math.ceil(n / 2) + codes
    if setup.method != "full":
        sizes |= {name: n * itemsize(setup.adapter_dtype) for name, n in tensors.adapters(setup).items()}
    blocks: dict[int, int] = {}
    root = 0
    for name, nbytes in sizes.items():
        number = next((int(piece) for piece in name.split(".") if piece.isdigit()), None)
        if number is None:
            root += nbytes
        else:
            blocks[number] = blocks.get(number, 0) + nbytes
    return blocks, root
