"""Checks of the exercises on several ranks: whose gradient counts how much, what is sent, a layer's part, what a rank holds."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from labkit.lab.check.compare import compare


def shared_gradient(function: Callable) -> None:
    """`function(gradients, tokens)`: the gradient of the loss per token over all ranks, (n,).

    `gradients[r]` is that of rank r's own mean loss, (n,); `tokens[r]` says over how many tokens that is a mean.
    """

    def inputs():
        ranks, n = random.randint(2, 5), random.randint(3, 6)
        tokens = random.sample(range(2, 60), ranks)
        return [torch.randn(n) for _ in range(ranks)], tokens

    def weighted(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return sum(weight * gradient for weight, gradient in zip(weights, gradients))

    compare(
        "shared_gradient",
        function,
        lambda g, t: weighted(g, [one / sum(t) for one in t]),
        {
            "a mean of means: a token of a rank with few tokens weighs more than one of another": (
                lambda g, t: weighted(g, [1 / len(t)] * len(t))
            ),
            "that is the sum over the ranks; what becomes of the tokens?": lambda g, t: weighted(
                g, [1.0] * len(t)
            ),
            "the sums are right; divide by the tokens of all ranks together": lambda g, t: weighted(g, t),
            "divide by all tokens, not by the number of ranks": lambda g, t: weighted(
                g, [one / len(t) for one in t]
            ),
            "a rank's mean weighs *more* the more tokens it is a mean of; yours divides by its tokens": (
                lambda g, t: weighted(g, [1 / one for one in t])
            ),
            "divided by the number of ranks once more than the mean needs, as DDP does it for you": (
                lambda g, t: weighted(g, [one / sum(t) / len(t) for one in t])
            ),
        },
        inputs,
    )


def sent_per_rank(function: Callable) -> None:
    """`function(weights, adapters, ranks)`: bytes that one rank sends in a step on a ring, (under DDP, under FSDP).

    `weights` are the bytes of all parameters as they are stored, adapters included; `adapters` are the bytes of what trains,
    and of its gradients.
    """

    def inputs():
        adapters = 4 * random.randint(1000, 9000)
        return adapters + 4 * random.randint(10_000, 90_000), adapters, random.choice([2, 3, 4, 5, 8])

    def answer(
        ddp: float = 2, gathers: float = 2, scatters: float = 1, part: Callable = lambda n: (n - 1) / n
    ):
        return lambda w, a, n: (ddp * part(n) * a, gathers * part(n) * w + scatters * part(n) * a)

    compare(
        "sent_per_rank",
        function,
        answer(),
        {
            "an all-reduce is a reduce-scatter and an all-gather: two rounds, not one": answer(ddp=1),
            "FSDP gathers a block twice, for its forward and for its backward pass": answer(gathers=1),
            "the gradients of what trains are scattered once; yours leaves them out": answer(scatters=0),
            "FSDP scatters gradients, and gathers nothing of them: each rank steps its own part": answer(
                scatters=2
            ),
            "that is what all ranks send together; one of them sends an N-th": answer(part=lambda n: n - 1),
            "on a ring a rank keeps its own piece: (N - 1) / N of the tensor leaves it": answer(
                part=lambda n: 1
            ),
            "with LoRA only adapters have gradients: DDP sends no weights": (
                lambda w, a, n: (2 * (n - 1) / n * w, answer()(w, a, n)[1])
            ),
            "frozen weights are gathered too: sharding does not ask whether they train": (
                lambda w, a, n: (answer()(w, a, n)[0], 3 * (n - 1) / n * a)
            ),
            "the order is (DDP, FSDP)": lambda w, a, n: answer()(w, a, n)[::-1],
        },
        inputs,
        parts=("DDP", "FSDP"),
        atol=1e-2,
    )


def layer_part(function: Callable) -> None:
    """`function(x, W, A, B, s, rank, ranks, layout)`: a rank's part of y = W x + s B A x, "column" or "row".

    x is (tokens, in) and whole, W (out, in), A (r, in), B (out, r). "column": (tokens, out / ranks). "row": the rank's summand,
    (tokens, out). Both widths can be divided by `ranks`.
    """
    layouts: list[str] = []

    def inputs():
        if not layouts:
            layouts.extend(["row", "column", "row", "column", "row"])
        ranks, r = random.choice([2, 3]), 2
        width, out = ranks * random.randint(2, 4), ranks * random.randint(5, 7)
        rank = random.randrange(1, ranks)
        return (
            torch.randn(4, width),
            torch.randn(out, width),
            torch.randn(r, width),
            torch.randn(out, r),
            random.choice([0.5, 2.0]),
            rank,
            ranks,
            layouts.pop(),
        )

    def cut(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
        return tensor.chunk(ranks, dim)[rank]

    def part(x, W, A, B, s, rank, ranks, layout, adapter: Callable | None = None):
        if layout == "column":
            mine = x @ cut(W, 0, rank, ranks).T
            update = s * x @ A.T @ cut(B, 0, rank, ranks).T
        else:
            x, A = cut(x, 1, rank, ranks), cut(A, 1, rank, ranks)
            mine = x @ cut(W, 1, rank, ranks).T
            update = s * x @ A.T @ B.T
        return mine + (update if adapter is None else adapter(update, layout, ranks))

    def with_update(change: Callable) -> Callable:
        """The right answer with another update."""
        return lambda x, W, A, B, s, rank, ranks, layout: part(x, W, A, B, s, rank, ranks, layout, change)

    def whole_update(x, W, A, B, s, rank, ranks, layout):
        whole = s * x @ A.T @ B.T
        return with_update(lambda u, kind, n: whole if kind == "row" else u)(
            x, W, A, B, s, rank, ranks, layout
        )

    def swapped(x, W, A, B, s, rank, ranks, layout):
        return part(x, W, A, B, s, rank, ranks, "row" if layout == "column" else "column")

    compare(
        "layer_part",
        function,
        part,
        {
            "the layouts are the other way round: column divides the outputs, row the inputs": swapped,
            "the adapter is missing in one of the layouts, or in both": with_update(
                lambda u, layout, n: 0 * u
            ),
            "the ranks' parts are added up, not averaged: the adapter's part needs no division": (
                with_update(lambda u, layout, n: u / n)
            ),
            "the scaling s is missing": lambda x, W, A, B, s, *rest: part(x, W, A, B, 1.0, *rest),
            "in the row layout each rank adds the *whole* update: cut A and x where W is cut": whole_update,
            "that is the whole layer; a rank has a part of it": lambda x, W, A, B, s, *_: (
                x @ W.T + s * x @ A.T @ B.T
            ),
            "yours is the part of another rank": lambda x, W, A, B, s, rank, n, layout: part(
                x, W, A, B, s, 0, n, layout
            ),
        },
        inputs,
    )


def rank_memory(function: Callable) -> None:
    """`function(blocks, block, root, adapters, ranks)`: bytes of a rank under FSDP when two blocks and the root are gathered.

    There are `blocks` blocks of `block` frozen bytes each, and `root` frozen bytes outside them. What trains takes `adapters`
    bytes, as much again for gradients, and twice that for AdamW's moments. Activations are left out.
    """

    def inputs():
        ranks = random.choice([2, 4, 8])
        block, root, adapters = (ranks * random.randint(100, 900) for _ in range(3))
        return random.randint(3, 40), block, root, adapters, ranks

    def answer(kept: float = 1, copies: float = 4, gathered: float = 2, rooted: float = 1, whole: float = 0):
        return lambda blocks, block, root, a, n: (
            kept * (blocks * block + root) / n + copies * a / n + gathered * block + rooted * root + whole * a
        )

    compare(
        "rank_memory",
        function,
        answer(),
        {
            "what is gathered is missing: a rank borrows two whole blocks, and the root": answer(
                gathered=0, rooted=0
            ),
            "the root is gathered too, and stays so until backward is done": answer(rooted=0),
            "two blocks are there at once: the one in use, and the next on its way": answer(gathered=1),
            "gradients and moments are missing: what trains is there four times": answer(copies=1),
            "AdamW has two moments: weights, gradients, and two more, four in all": answer(copies=3),
            "what trains is divided among the ranks as well": answer(copies=0, whole=4),
            "what is kept is divided among the ranks": lambda blocks, block, root, a, n: (
                blocks * block + root + 4 * a + 2 * block + root
            ),
            "gathered means whole: do not divide what is borrowed": lambda blocks, block, root, a, n: (
                (blocks * block + root + 4 * a + 2 * block + root) / n
            ),
        },
        inputs,
        atol=1e-2,
    )
