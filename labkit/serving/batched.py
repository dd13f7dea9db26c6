"""One base, many adapters, one forward pass: each row of a batch says which adapter it uses, or none.

    bank = AdapterBank(model)
    bank.load("adapters/support", "support")
    bank.load("adapters/sql", "sql")
    with bank.rows(["support", None, "sql", ("sql", 0.5)]):
        logits = model(input_ids).logits

Each adapted layer gets one wrapper, however many adapters there are. It calls the base's layer for all rows, and adds
what the adapters make of theirs (`labkit.serving.segments`). So a row's output is that of the row alone with its
adapter, up to rounding, and that of a row of None is the base's, bit for bit.

PEFT's `adapter_names` does the same with a loop over all adapters in every layer, a copy of rows in and out for each;
llama.cpp computes requests with different adapters one after another.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.checks import check_number, nearest
from labkit.lora.fingerprint import fingerprint
from labkit.lora.mounting import refuse_adapted, standing
from labkit.models.stand_in import StandIn
from labkit.models.surgery import swap_modules
from labkit.models.walk import unwrap
from labkit.serving.fast import add_in_place, is_fast
from labkit.serving.loaded import LoadedAdapter, identity_of, read_adapter
from labkit.serving.segments import Part, Segment, add_segments, look_up, shrink, sort_rows

PLANS = 8  # that a bank keeps: a batch that is decoded has the same rows for many steps

Row = str | tuple[str, float] | None  # an adapter's name; and a strength; or the base alone


class Plan:
    """Which rows of a batch use which adapter at which strength, and what that means for each layer.

    Args:
        rows: for each row an adapter and a strength, or None for the base alone.
    """

    def __init__(self, rows: Sequence[tuple[LoadedAdapter, float] | None]):
        self.rows = tuple(row if row is not None and row[1] != 0 else None for row in rows)
        self.adapters = {row[0] for row in rows if row is not None}
        self.parts: dict[str, Part] = {}

    def part(self, layer: str, device: torch.device) -> Part:
        """The part of one layer; adapters that have nothing for it are the base there."""
        if layer not in self.parts:
            self.parts[layer] = self.make_part(layer, device)
        return self.parts[layer]

    def make_part(self, layer: str, device: torch.device) -> Part:
        keys = [row if row is not None and layer in row[0].factors else None for row in self.rows]
        found, order, starts = sort_rows(keys)
        segments = []
        for (adapter, strength), start, stop in zip(found, starts, starts[1:]):
            factors = adapter.factors[layer]
            if factors.A.device != device:
                raise ValueError(
                    f"the adapter {adapter.name!r} is on {factors.A.device}, and {layer} computes on {device}: the model "
                    "was moved. Move it first, and load adapters then"
                )
            segments.append(Segment(start, stop, factors._replace(scaling=factors.scaling * strength)))
        rows = order.tolist()
        is_run = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
        return Part(order.to(device), slice(rows[0], rows[-1] + 1) if is_run else None, segments)


class BatchedLinear(StandIn):
    """A linear layer to whose output each row's adapter is added; the base's own where no batch is planned.

    Args:
        base: the layer.
        name: its own name.
        plans: of the bank; `plans.now` is the plan of the thread that asks.
    """

    dims = 3  # of x

    def __init__(self, base: nn.Module, name: str, plans: threading.local):
        super().__init__(base)
        self.name, self.plans = name, plans
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """`base(x)`, and for the rows of each adapter `+ s B A x`: (rows, tokens, in) to (rows, tokens, out)."""
        plan: Plan | None = getattr(self.plans, "now", None)
        if plan is None:
            return self.base(x)
        if x.dim() != self.dims or len(x) != len(plan.rows):
            raise ValueError(
                f"{self.name} is given x of shape {tuple(x.shape)} in a batch of {len(plan.rows)} rows, one use of an "
                "adapter for each: x must have these rows first, and then their tokens"
            )
        y = self.base(x)
        part = plan.part(self.name, x.device)
        if not part.segments:
            return y
        if is_fast(y, x, part):
            return add_in_place(y, x, part)
        return add_segments(y, x, part.order, part.segments, self.down)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """A x, (rows, tokens, r)."""
        return shrink(x, A)


class BatchedEmbedding(BatchedLinear):
    """`BatchedLinear` over an embedding: x is token ids, (rows, tokens)."""

    dims = 2

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """A x for one-hot x; Gemma's embedding multiplies what it looks up."""
        return look_up(x, A) * getattr(self.base, "embed_scale", 1.0)


class AdapterBank:
    """The adapters that are loaded for a base, by name, and which rows of the next forward pass use them.

    Threads may load, unload and compute at once. An adapter that a batch uses cannot be unloaded meanwhile.

    Args:
        model: a base in 32, 16 or 4 bits. Without a plan it computes what it did before.

    Raises:
        ValueError: the model carries adapters of another kind, merged or not, or another bank.
    """

    def __init__(self, model: nn.Module):
        refuse_adapted(model, "an AdapterBank")
        self.model = model
        self.adapters: dict[str, LoadedAdapter] = {}
        self.plans = threading.local()
        self.made: OrderedDict[tuple, Plan] = OrderedDict()
        self.in_use: Counter[LoadedAdapter] = Counter()
        self.lock = threading.RLock()

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of the base; it is hashed whole, once."""
        with self.lock:
            return fingerprint(self.model)

    @cached_property
    def base(self) -> str:
        """The identity of the base: one hash of its fingerprint."""
        return identity_of(self.fingerprint)

    def load(self, path: str | Path, name: str) -> LoadedAdapter:
        """Load the adapter in the PEFT folder `path`, so that rows can use it as `name`.

        Raises:
            ValueError: the name is taken, or the adapter cannot be one of several; see
                `labkit.serving.loaded.read_adapter`. Nothing is changed then.
        """
        self.check_free(name)
        adapter = read_adapter(self.model, path, name, self.fingerprint)
        with self.lock:
            self.check_free(name)
            new = [layer for layer in adapter.factors if not self.wraps(layer)]
            swap_modules(self.model, {layer: self.wrapper(layer) for layer in new})
            self.adapters[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter. Layers that no other one adapts are the base's own modules again.

        Raises:
            KeyError: there is none of this name.
            ValueError: a batch uses it now.
        """
        with self.lock:
            adapter = self.adapter(name)
            if self.in_use[adapter]:
                raise ValueError(f"the adapter {name!r} is in use by a batch; unload it after that")
            del self.adapters[name]
            self.made = OrderedDict(
                (key, plan) for key, plan in self.made.items() if adapter not in plan.adapters
            )
            kept = {layer for other in self.adapters.values() for layer in other.factors}
            alone = [layer for layer in adapter.factors if layer not in kept]
            swap_modules(self.model, {layer: standing(self.model, layer).base for layer in alone})

    def adapter(self, name: str) -> LoadedAdapter:
        """The adapter of this name.

        Raises:
            KeyError: there is none; says which there are. Nothing falls back to the base.
        """
        if name not in self.adapters:
            shown = ", ".join(list(self.adapters)[:20]) or "none"
            raise KeyError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)} Loaded: {shown}")
        return self.adapters[name]

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Iterator[Plan]:
        """Within the block, the rows of every forward pass of this thread use these adapters.

        Args:
            rows: one for each row of the batch: a name, a name and a strength, or None for the base alone.

        Raises:
            KeyError: no adapter of that name is loaded.
            ValueError: a strength that is no number.
        """
        with self.lock:
            plan = self.plan(rows)
            self.in_use.update(plan.adapters)
        before = getattr(self.plans, "now", None)
        self.plans.now = plan
        try:
            yield plan
        finally:
            self.plans.now = before
            with self.lock:
                self.in_use.subtract(plan.adapters)
                self.in_use += Counter()  # drops those at zero, which would be kept in memory

    def plan(self, rows: Sequence[Row]) -> Plan:
        """The plan of a batch; the same one for the same rows as a short while ago."""
        key = tuple(rows)
        if key not in self.made:
            self.made[key] = Plan([None if row is None else self.use(row) for row in key])
        self.made.move_to_end(key)
        while len(self.made) > PLANS:
            self.made.popitem(last=False)
        return self.made[key]

    def use(self, row: str | tuple[str, float]) -> tuple[LoadedAdapter, float]:
        name, strength = (row, 1.0) if isinstance(row, str) else row
        check_number("strength", strength, at_least=-1e6, below=1e6)
        return self.adapter(name), strength

    def check_free(self, name: str) -> None:
        """Raise a `ValueError` unless `name` can be that of another adapter."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r}: give the adapter a name")
        if name in self.adapters:
            raise ValueError(
                f"an adapter {name!r} is loaded already; other weights need another name, such as 'support@v2', or "
                "unload it first"
            )

    def wraps(self, layer: str) -> bool:
        return isinstance(standing(self.model, layer), BatchedLinear)

    def wrapper(self, layer: str) -> BatchedLinear:
        base = standing(self.model, layer)
        is_embedding = isinstance(unwrap(base), nn.Embedding)
        kind = BatchedEmbedding if is_embedding else BatchedLinear
        return kind(base, layer, self.plans)
