"""Checks of the exercises on merging and export: what survives a merge, which codes move, sums of adapters, rows in GGUF."""

import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import compare
from labkit.lab.check.variants import is_matrices
from labkit.models.gguf_layout import rows_in_halves, rows_in_pairs
from labkit.quant.codebooks import codebook


def survival_share(function: Callable) -> None:
    """`function(W, merged, delta)`: the share of the update `delta` that is in `merged`, a number."""

    def inputs():
        W, delta = torch.randn(6, 9, dtype=torch.float64), 0.3 * torch.randn(6, 9, dtype=torch.float64)
        return W, W + random.choice([0.3, 0.6, 0.9]) * delta + 0.2 * torch.randn_like(W), delta

    def right(W, merged, delta):
        return ((merged - W) * delta).sum() / delta.square().sum()

    compare(
        "survival_share",
        lambda *given: scalar(function(*given)),
        right,
        {
            "take W away first: what counts is how the weight *changed*": (
                lambda W, merged, delta: (merged * delta).sum() / delta.square().sum()
            ),
            "that is a cosine, which is blind to size; divide by <delta, delta>": (
                lambda W, merged, delta: torch.cosine_similarity((merged - W).flatten(), delta.flatten(), dim=0)
            ),
            "that is a ratio of lengths, in which rounding noise counts as update; project the change on delta": (
                lambda W, merged, delta: (merged - W).norm() / delta.norm()
            ),
            "that is how far the merged weight is from the sum, in lengths of delta; wanted is the part along delta": (
                lambda W, merged, delta: (merged - W - delta).norm() / delta.norm()
            ),
            "divide by the *square* of delta's length": (
                lambda W, merged, delta: ((merged - W) * delta).sum() / delta.norm()
            ),
            "that is the projection on the change, not on delta: divide by <delta, delta>": (
                lambda W, merged, delta: ((merged - W) * delta).sum() / (merged - W).square().sum()
            ),
            "the other way round: the change over what it was to be": (
                lambda W, merged, delta: delta.square().sum() / ((merged - W) * delta).sum()
            ),
            "that is what was lost; the share that is left is 1 minus it": (
                lambda W, merged, delta: 1 - right(W, merged, delta)
            ),
        },
        inputs,
    )  # fmt: skip


def scalar(answer):
    """A tensor of one number as that number; anything else as it is."""
    return answer.detach().reshape(()) if torch.is_tensor(answer) and answer.numel() == 1 else answer


def moved_codes(function: Callable) -> None:
    """`function(codes, delta, levels, absmax)`: which weights of a block get another code when `delta` is added.

    `codes` and `delta` are (n,), `levels` are sorted and (16,), `absmax` is a number; the answer is (n,), boolean.
    """
    levels = codebook("nf4").sort().values.double()

    def inputs():
        codes, absmax = torch.randint(0, 16, (200,)), random.choice([0.2, 0.4, 3.0])
        return codes, 0.12 * absmax * torch.randn(200, dtype=torch.float64), levels, absmax

    def new_codes(codes, delta, levels, absmax):
        return (levels[codes] * absmax + delta)[:, None].sub(levels * absmax).abs().argmin(1)

    def right(codes, delta, levels, absmax):
        return new_codes(codes, delta, levels, absmax) != codes

    def gap(codes, delta, levels, absmax):
        """To the next level in the direction of delta; infinite at either end."""
        ends = torch.full((1,), torch.inf, dtype=levels.dtype)
        gaps = absmax * torch.cat([ends, levels.diff(), ends])
        return torch.where(delta > 0, gaps[codes + 1], gaps[codes])

    def smaller_gap(codes, delta, levels, absmax):
        return torch.minimum(gap(codes, delta, levels, absmax), gap(codes, -delta, levels, absmax))

    compare(
        "moved_codes",
        function,
        right,
        {
            "delta must pass *half* of the gap to the next level; yours asks for all of it": (
                lambda *given: given[1].abs() > gap(*given)
            ),
            "the levels are in units of absmax: multiply them by it, or divide delta": (
                lambda codes, delta, levels, absmax: right(codes, delta, levels, 1.0)
            ),
            "delta is divided by absmax twice, or the levels multiplied twice": (
                lambda codes, delta, levels, absmax: right(codes, delta, levels, absmax**2)
            ),
            "a weight has two neighbours: compare with the gap on the side that delta points to": (
                lambda *given: given[1].abs() > smaller_gap(*given) / 2
            ),
            "NF4's gaps differ, narrow in the middle and wide outside; yours uses their mean": (
                lambda codes, delta, levels, absmax: delta.abs() > absmax * levels.diff().mean() / 2
            ),
            "those are the weights that stay; wanted are those that move": lambda *given: ~right(*given),
            "those are the new codes; compare them with the old ones": new_codes,
            "only updates that point upwards are found; a weight may go down too": (
                lambda *given: right(*given) & (given[1] > 0)
            ),
        },
        inputs,
    )


def cat_factors(function: Callable) -> None:
    """`function(adapters, weights)`: A, B of the exact weighted sum of the adapters, each an (A, B, scaling).

    A is (r, in) and B (out, r); the layer of the result has scaling 1.
    """

    def inputs():
        out, width, r = random.sample(range(4, 9), 3)
        adapters = [
            (torch.randn(r, width), torch.randn(out, r), random.choice([0.5, 2.0, 3.0])) for _ in range(2)
        ]
        return adapters, random.choice([[0.7, 0.4], [1.5, -0.5], [0.25, 0.6]])

    def stacked(for_A: Callable, for_B: Callable) -> Callable:
        """Factors one below the other and side by side, multiplied by functions of weight and scaling."""

        def answer(adapters, weights):
            pairs = list(zip(adapters, weights))
            A = torch.cat([for_A(w, s) * A for (A, _, s), w in pairs])
            return A, torch.cat([for_B(w, s) * B for (_, B, s), w in pairs], dim=1)

        return answer

    def added(adapters, weights):
        A = sum(A for A, _, _ in adapters)
        return A, sum(w * s * B for (_, B, s), w in zip(adapters, weights))

    def mean_of(adapters, weights):
        A, B = right(adapters, weights)
        return A, B / len(adapters)

    right = stacked(lambda w, s: 1.0, lambda w, s: w * s)

    def flat(answer):
        """The shapes and the product: factors are right in any order."""
        if not is_matrices(answer, 2):
            return answer
        A, B = (part.detach().double() for part in answer)
        return tuple(A.shape), tuple(B.shape), B @ A if B.shape[1] == len(A) else torch.zeros(0)

    compare(
        "cat_factors",
        lambda *given: flat(function(*given)),
        lambda *given: flat(right(*given)),
        {
            "adding factors adds cross terms, B1 A2 and B2 A1, that nobody trained; stack them": (
                lambda *given: flat(added(*given))
            ),
            "each adapter has a scaling of its own, and yours is missing: the result's layer has scaling 1": (
                lambda *given: flat(stacked(lambda w, s: 1.0, lambda w, s: w)(*given))
            ),
            "the weights are missing": lambda *given: flat(stacked(lambda w, s: 1.0, lambda w, s: s)(*given)),
            "the weight is in both factors, so it counts squared; put it in one": (
                lambda *given: flat(stacked(lambda w, s: w, lambda w, s: w * s)(*given))
            ),
            "the scaling is in both factors, so it counts squared; put it in one": (
                lambda *given: flat(stacked(lambda w, s: s, lambda w, s: w * s)(*given))
            ),
            "weight and scaling are in both factors, so they count squared; put them in one": (
                lambda *given: flat(stacked(lambda w, s: w * s, lambda w, s: w * s)(*given))
            ),
            "that is the mean; wanted is the weighted sum": lambda *given: flat(mean_of(*given)),
            "A and B are swapped: A (r, in) comes first": lambda *given: flat(right(*given)[::-1]),
        },
        inputs,
    )


def gguf_rows(function: Callable) -> None:
    """`function(B, heads)`: the B of a LoRA on q_proj in llama.cpp's order of rows, (out, r), from Hugging Face's."""

    def inputs():
        heads, head_dim = random.choice([(4, 8), (6, 8), (4, 16)])  # of 4, the way back is the same
        return torch.randn(heads * head_dim, 4 * heads), heads

    def of_swapped(B, heads):
        return rows_in_pairs(B, len(B) // heads)

    compare(
        "gguf_rows",
        function,
        rows_in_pairs,
        {
            "that is the way back, from pairs of neighbours to two halves": rows_in_halves,
            "that treats all rows as one head; each head is permuted by itself": lambda B, heads: (
                rows_in_pairs(B, 1)
            ),
            "heads and head_dim are the wrong way round: the heads come first": of_swapped,
            "the columns of B are ranks and keep their order; permute the rows": (
                lambda B, heads: rows_in_pairs(B.T.contiguous(), heads).T
            ),
            "the rows are as they were; llama.cpp rotates *neighbours*, Hugging Face number i of either half": (
                lambda B, heads: B
            ),
            "the halves of each head changed places; they are to be interleaved": lambda B, heads: (
                B.reshape(heads, 2, -1, B.shape[1]).flip(1).reshape(B.shape)
            ),
        },
        inputs,
    )
