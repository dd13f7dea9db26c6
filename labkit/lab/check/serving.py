"""Checks of the exercises on many adapters: rows by adapter, a mixed batch, the time of a step, what a cache may reuse."""

import itertools
import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from labkit.lab.check.compare import compare
from labkit.serving.segments import sort_rows


def segment_rows(function: Callable) -> None:
    """`function(rows)`: names, order and starts of a batch whose rows name an adapter, or None for the base.

    The names stand in the order in which they first appear; those rows of `order` from `starts[i]` to `starts[i + 1]`
    belong to `names[i]`.
    """

    def inputs():
        rows = [random.choice(["sql", "support", "prose", None]) for _ in range(random.randint(4, 9))]
        return ([*rows, "support", None, "prose", "support"],)

    def right(rows):
        names, order, starts = sort_rows(rows)
        return names, order.tolist(), starts

    def with_order(change: Callable[[list, list], list]) -> Callable:
        """The right answer with another order of rows."""
        return lambda rows: (right(rows)[0], change(*right(rows)[1:]), right(rows)[2])

    def with_starts(change: Callable[[list], list]) -> Callable:
        return lambda rows: (*right(rows)[:2], change(right(rows)[2]))

    def of_base(rows):
        """None taken for one more adapter."""
        names, order, starts = right(["base" if row is None else row for row in rows])
        return [None if name == "base" else name for name in names], order, starts

    def by_name(rows):
        names = sorted({row for row in rows if row is not None})
        order = [i for name in names for i, row in enumerate(rows) if row == name]
        return names, order, [0, *accumulate(rows.count(name) for name in names)]

    compare(
        "segment_rows",
        lambda rows: plain(function(rows)),
        lambda rows: plain(right(rows)),
        {
            "rows of None are the base's own: they are in no segment": lambda rows: plain(of_base(rows)),
            "those are counts; where each segment begins is the sum of the counts before it": (
                lambda rows: plain(with_starts(lambda s: [b - a for a, b in itertools.pairwise(s)])(rows))
            ),
            "the first segment begins at 0": lambda rows: plain(with_starts(lambda s: s[1:])(rows)),
            "starts ends with the number of all adapted rows, where the last segment stops": (
                lambda rows: plain(with_starts(lambda s: s[:-1])(rows))
            ),
            "order is to say which row stands at each place; yours says at which place each row stands": (
                lambda rows: plain(with_order(places)(rows))
            ),
            "the names are in the alphabet's order; wanted is that of their first row": (
                lambda rows: plain(by_name(rows))
            ),
            "the rows of one adapter should keep their order; yours are turned round": (
                lambda rows: plain(
                    with_order(
                        lambda order, starts: [
                            i for a, b in itertools.pairwise(starts) for i in order[a:b][::-1]
                        ]
                    )(rows)
                )
            ),
        },
        lambda: inputs(),
    )


def plain(answer):
    """Names as numbers, which can be compared; anything that is no answer as it is."""
    if not isinstance(answer, tuple) or len(answer) != 3:
        return answer
    names, order, starts = (part.tolist() if torch.is_tensor(part) else part for part in answer)
    codes = {"sql": 1, "support": 2, "prose": 3}
    return tuple(
        [codes.get(one, one) if isinstance(one, str) else -1 if one is None else one for one in part]
        for part in (list(names), list(order), list(starts))
    )


def places(order: list, starts: list) -> list:
    """At which place each of the sorted rows stands, as somebody who mixes up the two directions writes it."""
    ranked = sorted(order)
    return [order.index(row) for row in ranked]


def mixed_forward(function: Callable) -> None:
    """`function(x, W, adapters, rows)`: y, (rows, out), of a batch in which each row has its own adapter, or None.

    `x` is (rows, in), `W` is (out, in), and `adapters` is {name: (A, B, scaling)} with A (r, in) and B (out, r).
    """

    def inputs():
        width, out = random.sample(range(5, 12), 2)
        adapters = {
            name: (torch.randn(r, width), torch.randn(out, r), scaling)
            for name, r, scaling in (("sql", 2, 2.0), ("support", 3, 0.5), ("prose", 1, 1.5))
        }
        rows = random.sample(["sql", None, "support", "prose", "sql", None, "support"], 7)
        return torch.randn(7, width), torch.randn(out, width), adapters, rows

    def correction(x, adapters, name, scaled=True):
        A, B, scaling = adapters[name]
        return (scaling if scaled else 1.0) * x @ A.T @ B.T

    def right(x, W, adapters, rows, *, scaled=True, base=1.0, fallback=None):
        y = base * (x @ W.T)
        for i, row in enumerate(rows):
            if (name := row or fallback) is not None:
                y[i] += correction(x[i], adapters, name, scaled)
        return y

    def left_sorted(x, W, adapters, rows):
        """Each correction at the place that its row has in the sorted batch."""
        y, (_, order, _) = x @ W.T, sort_rows(rows)
        for place, i in enumerate(order.tolist()):
            y[place] += correction(x[i], adapters, rows[i])
        return y

    def one_for_all(x, W, adapters, rows):
        first = next(row for row in rows if row is not None)
        return x @ W.T + correction(x, adapters, first)

    def summed(x, W, adapters, rows):
        return x @ W.T + sum(correction(x, adapters, name) for name in adapters)

    compare(
        "mixed_forward",
        function,
        right,
        {
            "rows of the base get the last adapter: -1 is a valid index in Python. They are to get none": (
                lambda *given: right(*given, fallback=list(given[2])[-1])
            ),
            "rows of the base get the first adapter; they are to get none": (
                lambda *given: right(*given, fallback=next(iter(given[2])))
            ),
            "the scaling of each adapter is missing": lambda *given: right(*given, scaled=False),
            "the rows' own output of the base is missing: add to it": lambda *given: right(*given, base=0.0),
            "the corrections are in the order of the sorted rows; put each back where its row came from": (
                left_sorted
            ),
            "all rows get one adapter, that of the first row that has one": one_for_all,
            "every row gets the sum of all adapters, as if they had been merged": summed,
        },
        inputs,
    )


def step_seconds(function: Callable) -> None:
    """`function(batch, n, W, a, P, P_a, bandwidth, flops)`: seconds of one step by the roofline, for a shared base.

    `batch` rows use `n` different adapters; the base has `P` parameters in `W` bytes, an adapter `P_a` in `a` bytes.
    """

    cases = itertools.cycle([(2, 1, 512e9), (64, 12, 64e9), (8, 4, 512e9), (256, 3, 64e9), (16, 16, 1024e9)])

    def inputs():
        batch, n, flops = next(cases)  # reading decides, then arithmetic, and so on
        P, P_a = random.choice([1e8, 3e8]), random.choice([4e6, 2e7])
        return batch, n, 4 * P, 4 * P_a, P, P_a, 16e9, flops

    def parts(batch, n, W, a, P, P_a, bandwidth, flops, *, bytes_=None, work=None):
        reading = (W + n * a if bytes_ is None else bytes_) / bandwidth
        return reading, (2 * batch * (P + P_a) if work is None else work) / flops

    def right(*given):
        return max(parts(*given))

    def other(bytes_: Callable | None = None, work: Callable | None = None) -> Callable:
        """The same with other bytes to read, or other work."""
        return lambda *g: max(parts(*g, bytes_=bytes_ and bytes_(*g), work=work and work(*g)))

    compare(
        "step_seconds",
        function,
        right,
        {
            "reading and computing overlap: the slower one decides, not their sum": lambda *g: sum(parts(*g)),
            "an adapter is read once, however many rows use it: n of them, not one for each row": (
                other(lambda batch, n, W, a, *_: W + batch * a)
            ),
            "the base is read once for all rows: that is what a batch is for": (
                other(lambda batch, n, W, a, *_: batch * W + n * a)
            ),
            "the adapters' bytes are missing": other(lambda batch, n, W, *_: W),
            "a parameter costs a multiplication and an addition for each row: 2": (
                other(None, lambda batch, n, W, a, P, P_a, *_: batch * (P + P_a))
            ),
            "a row is multiplied with its own adapter alone, not with all n": (
                other(None, lambda batch, n, W, a, P, P_a, *_: 2 * batch * (P + n * P_a))
            ),
            "the adapters' products are missing": (
                other(None, lambda batch, n, W, a, P, *_: 2 * batch * P)
            ),
            "the work is for every row of the batch": (
                other(None, lambda batch, n, W, a, P, P_a, *_: 2 * (P + P_a))
            ),
            "the slower of the two decides; yours takes the faster": lambda *g: min(parts(*g)),
        },
        inputs,
    )  # fmt: skip


def reusable_tokens(function: Callable) -> None:
    """`function(kept, who, ids)`: how many tokens of the prompt `ids` need not be computed again, for the adapter `who`.

    `kept` is a list of (who, ids) whose keys and values are there; a who is (base, name, version, strength). One token is
    always left to compute: its logits choose the next one.
    """
    faults = itertools.cycle(random.sample(["version", "strength", "base", "renamed", "whole"], 5))

    def inputs():
        prompt, more = random.sample(range(99), random.randint(6, 9)), [100, 101]
        me, fault = ("base", "support", "v2", 1.0), next(faults)
        found = {
            "version": (("base", "support", "v1", 1.0), [*prompt[:5], *more]),
            "strength": (("base", "support", "v2", 0.5), [*prompt[:5], *more]),
            "base": (("other", "support", "v2", 1.0), [*prompt[:5], *more]),
            "renamed": (("base", "help", "v2", 1.0), [*prompt[:4], *more]),
            "whole": (me, [*prompt, *more]),
        }
        kept = [(me, [99, *prompt]), (me, [*prompt[:2], *more]), (me, [*prompt[:3], *more])]
        return [*kept, found[fault]], me, prompt

    def same(mine: Sequence, theirs: Sequence, parts: Sequence[int]) -> bool:
        return all(mine[i] == theirs[i] for i in parts)

    def common(one: Sequence, other: Sequence) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))

    def longest(kept, who, ids, *, parts=(0, 2, 3), left=1, whole=False):
        found = [
            common(theirs, ids)
            for one, theirs in kept
            if same(who, one, parts) and (not whole or common(theirs, ids) == len(theirs))
        ]
        return min(max(found, default=0), len(ids) - left)

    def first(kept, who, ids):
        found = [common(theirs, ids) for one, theirs in kept if same(who, one, (0, 2, 3))]
        return min(next((n for n in found if n), 0), len(ids) - 1)

    compare(
        "reusable_tokens",
        function,
        longest,
        {
            "the strength of the adapter is part of what computed them": (
                lambda *given: longest(*given, parts=(0, 2))
            ),
            "the base is part of what computed them": lambda *given: longest(*given, parts=(2, 3)),
            "an adapter that was renamed computes the same; its name does not matter": (
                lambda *given: longest(*given, parts=(0, 1, 2, 3))
            ),
            "a name is no identity: other weights may have come under it. Compare the version": (
                lambda *given: longest(*given, parts=(0, 1, 3))
            ),
            "that looks at the text alone: another adapter's keys and values are other numbers": (
                lambda *given: longest(*given, parts=())
            ),
            "one token must be left to compute: its logits choose the next one": (
                lambda *given: longest(*given, left=0)
            ),
            "a common beginning is enough; yours wants the whole of a kept text": (
                lambda *given: longest(*given, whole=True)
            ),
            "take the longest of those that fit; yours takes the first": first,
        },
        inputs,
    )
