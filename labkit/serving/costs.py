"""What a step of decoding costs when n adapters share a base, and when each has a merged copy of its own.

A step reads the base once, W bytes, and each adapter in use, a bytes; every row multiplies all their parameters, P
and P_a. So with a memory of BW bytes and a processor of C operations a second, and b rows,

    T_shared = max((W + n a) / BW,  2 b (P + P_a) / C) + t_call calls
    T_copies = sum_i max(W / BW,  2 b_i P / C)                            copies answer one after another

Few rows: reading decides, and sharing wins by n / (1 + n a/W). Many rows: arithmetic decides, and copies win by
1 + P_a/P, while they fit. The two meet at b* = C W / (2 P BW) rows.

These are bounds: a machine that reads while it multiplies, and a processor that is always busy.

Source: the roofline model (Williams, Waterman and Patterson 2009); S-LoRA (Sheng et al. 2023), sections 3 and 7.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from labkit.checks import check_choice, check_number, check_positive, check_whole
from labkit.lora.targets import matching_layers
from labkit.memory.counting import constants_bytes
from labkit.models.surgery import is_output_layer
from labkit.quant.layer_kinds import is_linear, widths
from labkit.quant.linear import QuantLinear

CALLS = {"one for all": 0, "segments": 2, "loop": 5}  # for each adapter and layer; see `calls_of`


@dataclass(frozen=True)
class Machine:
    """What a processor does a second, at best.

    Attributes:
        bandwidth: bytes read from memory a second.
        flops: operations a second in products of matrices; a multiplication and its addition are two.
        call: seconds that a call takes besides its work.
    """

    bandwidth: float
    flops: float
    call: float = 0.0

    def __post_init__(self):
        check_positive("bandwidth", self.bandwidth, usual="bytes a second; a desktop has 2e10 to 8e10")
        check_positive("flops", self.flops, usual="operations a second; a core has about 1e11")
        check_number("call", self.call, at_least=0, usual="seconds; a call of PyTorch takes about 5e-6")


@dataclass(frozen=True)
class ServedSizes:
    """What a step of decoding touches, and what memory holds.

    Attributes:
        base_bytes: W, read at every step: all weights, but not an embedding of which a few rows are looked up.
        resident_bytes: all weights: what the base, or one merged copy, takes in memory.
        parameters: P, those that every row multiplies.
        adapted_bytes, adapted_parameters: of the adapted layers' weights, which merging changes.
        adapter_bytes, adapter_parameters: a and P_a, of one adapter.
        layers: L, that an adapter has.
    """

    base_bytes: int
    resident_bytes: int
    parameters: int
    adapted_bytes: int
    adapted_parameters: int
    adapter_bytes: int
    adapter_parameters: int
    layers: int

    @property
    def share(self) -> float:
        """a / W: what one adapter adds to the bytes of a step."""
        return self.adapter_bytes / self.base_bytes


def count_sizes(
    model: nn.Module,
    r: int = 16,
    targets: str | Sequence[str] = "all-linear",
    bits: int | None = None,
    adapter_bits: int = 32,
) -> ServedSizes:
    """Count what serving a model with adapters touches.

    Args:
        model: any model, also one in 4 bits or on the meta device (`labkit.models.shapes.meta_model`).
        r: rank of the adapters.
        targets: their layers.
        bits: of the weights of all linear layers but the output layer: 32, 16, or 4 (NF4 in blocks of 64, double
            quantization); None: as the model has them.
        adapter_bits: 32 or 16.
    """
    check_whole("r", r)
    check_choice("bits", bits, (None, 4, 16, 32))
    check_choice("adapter_bits", adapter_bits, (16, 32))
    nbytes = sum(p.nbytes for p in model.parameters())  # a tied weight once
    parameters, of_weight = 0, {}
    for name, layer in model.named_modules():
        if not is_linear(layer):
            continue
        n, packed = math.prod(widths(layer)), isinstance(layer, QuantLinear)
        parameters += n
        of_weight[name] = stored = layer.weight.nbytes
        if bits is not None and not is_output_layer(model, layer):
            of_weight[name] = n // 2 + constants_bytes(n) if bits == 4 else n * bits // 8
        nbytes += of_weight[name] - (0 if packed else stored)
    names = matching_layers(model, targets)
    sides = [widths(model.get_submodule(name)) for name in names]
    adapter = r * sum(map(sum, sides))
    return ServedSizes(
        base_bytes=nbytes - looked_up_bytes(model),
        resident_bytes=nbytes,
        parameters=parameters,
        adapted_bytes=sum(of_weight[name] for name in names),
        adapted_parameters=sum(a * b for a, b in sides),
        adapter_bytes=adapter * adapter_bits // 8,
        adapter_parameters=adapter,
        layers=len(names),
    )


def looked_up_bytes(model: nn.Module) -> int:
    """Bytes of embeddings that no linear layer shares: a step reads a row of them for each token."""
    linear = {id(layer.weight) for layer in model.modules() if is_linear(layer)}
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(weight.nbytes for weight in tables if id(weight) not in linear)


def calls_of(sizes: ServedSizes, distinct: float, how: str = "segments") -> float:
    """Calls of a step besides the base's own.

    Args:
        sizes: of the model.
        distinct: n, adapters in use.
        how: "segments", two products for each adapter and layer (`labkit.serving.segments`); "loop", about five, with
            the copies of rows in and out (PEFT's `adapter_names`); "one for all", one a layer however many adapters
            (`labkit.serving.few_rows`).
    """
    check_choice("how", how, CALLS)
    return sizes.layers * (min(1.0, distinct) if how == "one for all" else CALLS[how] * distinct)


def shared_step(
    sizes: ServedSizes, machine: Machine, batch: float, distinct: float, calls: float = 0
) -> float:
    """T_shared in seconds: one step of `batch` rows that use `distinct` adapters of one base.

        max((W + n a) / BW, 2 b (P + P_a) / C) + t_call calls

    Args:
        sizes, machine: of the model, and what it runs on.
        batch: b, rows.
        distinct: n, of one adapter or more in use; it may be an expected number. 0 is the base alone.
        calls: besides the base's own; see `calls_of`.
    """
    check_positive("batch", batch)
    check_number("distinct", distinct, at_least=0)
    multiplied = sizes.parameters + sizes.adapter_parameters * min(1.0, distinct)
    reading = (sizes.base_bytes + distinct * sizes.adapter_bytes) / machine.bandwidth
    return max(reading, 2 * batch * multiplied / machine.flops) + machine.call * calls


def copies_step(sizes: ServedSizes, machine: Machine, rows: Iterable[float]) -> float:
    """T_copies in seconds: a step of each merged copy, one after another.

        sum_i max(W / BW, 2 b_i P / C)

    Args:
        sizes, machine: of the model, and what it runs on.
        rows: b_i of each copy; one without rows does nothing.
    """
    return sum(shared_step(sizes, machine, b, 0) for b in rows if b)


def deal(batch: int, distinct: int) -> list[int]:
    """How many of `batch` rows each of `distinct` adapters gets, as evenly as possible.

    >>> deal(16, 5)
    [4, 3, 3, 3, 3]
    """
    check_whole("batch", batch)
    check_whole("distinct", distinct)
    return [batch // distinct + (i < batch % distinct) for i in range(distinct)]


def gain_of_sharing(sizes: ServedSizes, distinct: float) -> float:
    """T_copies / T_shared where reading decides both: n / (1 + n a/W). It grows to W/a, and no further."""
    check_number("distinct", distinct, at_least=0)
    return distinct / (1 + distinct * sizes.share)


def boundary_batch(sizes: ServedSizes, machine: Machine) -> float:
    """b* = C W / (2 P BW): rows up to which the base's step takes as long as reading it does."""
    return machine.flops * sizes.base_bytes / (2 * sizes.parameters * machine.bandwidth)


def break_even_time(
    sizes: ServedSizes, machine: Machine, batch: int, how: str = "segments", memory: float = math.inf
) -> int | None:
    """The fewest adapters from which sharing answers a batch sooner than merged copies do; None if copies win always.

    Args:
        sizes, machine: of the model, and what it runs on.
        batch: rows, dealt to the adapters evenly; so there are no more adapters than rows.
        how: see `calls_of`.
        memory: bytes. Where copies no longer fit, sharing has won.
    """
    most = copies_that_fit(sizes, memory)
    for n in range(1, batch + 1):
        shared = shared_step(sizes, machine, batch, n, calls_of(sizes, n, how))
        if n > most or shared < copies_step(sizes, machine, deal(batch, n)):
            return n
    return None


def break_even_memory(sizes: ServedSizes) -> int | None:
    """The fewest adapters from which R + n a < n R: 2, unless an adapter is more than half of its base."""
    left = sizes.resident_bytes - sizes.adapter_bytes
    return None if left <= 0 else math.floor(sizes.resident_bytes / left) + 1


def shared_bytes(sizes: ServedSizes, adapters: float) -> float:
    """R + n a: memory for one base and so many adapters; without keys and values."""
    return sizes.resident_bytes + adapters * sizes.adapter_bytes


def copies_bytes(sizes: ServedSizes, adapters: float) -> float:
    """n R: memory for so many merged copies."""
    return adapters * sizes.resident_bytes


def adapters_that_fit(sizes: ServedSizes, memory: float) -> float:
    """How many adapters fit beside their base in `memory` bytes; 0 if not even the base does."""
    return math.inf if memory == math.inf else max(0, (memory - sizes.resident_bytes) // sizes.adapter_bytes)


def copies_that_fit(sizes: ServedSizes, memory: float) -> float:
    """How many merged copies fit in `memory` bytes."""
    return math.inf if memory == math.inf else memory // sizes.resident_bytes


def merge_seconds(sizes: ServedSizes, machine: Machine, r: int) -> float:
    """Seconds to merge an adapter, or to take it out: the adapted weights are read and written.

    max(2 W_adapted / BW, 2 r P_adapted / C)
    """
    check_whole("r", r)
    moved = 2 * sizes.adapted_bytes / machine.bandwidth
    return max(moved, 2 * r * sizes.adapted_parameters / machine.flops)


def zipf(adapters: int, skew: float = 1.0) -> np.ndarray:
    """The share of requests for each of so many adapters, (adapters,): in proportion to rank to the power of -skew.

    A skew of 0 asks for all alike.
    """
    check_whole("adapters", adapters)
    check_number("skew", skew, at_least=0, usual="1 is Zipf's law, 0 asks for all alike")
    popularity = np.arange(1, adapters + 1, dtype=float) ** -skew
    return popularity / popularity.sum()


def distinct_adapters(popularity: Sequence[float] | np.ndarray, batch: float) -> float:
    """The expected number of distinct adapters in a batch of independent requests: sum_i 1 - (1 - p_i)^b.

    Args:
        popularity: how often each adapter is asked for, in any unit.
        batch: rows.

    >>> round(distinct_adapters(zipf(100), 16), 1)
    11.7
    """
    check_number("batch", batch, at_least=0)
    p = np.asarray(popularity, dtype=float)
    return float((1 - (1 - p / p.sum()) ** batch).sum())
