"""Checks of the exercises on the rank of updates: spectra, truncation, similarity of subspaces, intruders."""

import math
import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import compare


def effective_rank(function: Callable) -> None:
    """`function(s)`: exp of the entropy of the singular values over their sum; s (r,) may hold zeros."""

    def inputs():
        s = torch.rand(random.randint(4, 9)) * random.choice([0.5, 3, 20])
        s[-1] = 0
        return (s.sort(descending=True).values,)

    def entropy(x):
        p = x / x.sum()
        return torch.special.entr(p).sum()

    compare(
        "effective_rank",
        function,
        lambda s: entropy(s).exp(),
        {
            "the entropy is that of the singular values, not of their squares: squares are energy, and give a smaller "
            "rank": lambda s: entropy(s**2).exp(),
            "that is the entropy itself; the rank is exp of it": entropy,
            "an entropy in bits (log2) goes with a power of 2, not with exp": (
                lambda s: (entropy(s) / math.log(2)).exp()
            ),
            "that is the stable rank, the sum of squares over the largest square": (
                lambda s: (s**2).sum() / s[0] ** 2
            ),
            "a singular value of zero became NaN: 0 log 0 counts as 0 (torch.special.entr does that)": (
                lambda s: (-(s / s.sum()) * (s / s.sum()).log()).sum().exp()
            ),
            "divide by the sum of the singular values, so they add up to 1; yours are divided by the largest": (
                lambda s: torch.special.entr(s / s[0]).sum().exp()
            ),
            "divide by their sum first: an entropy needs shares that add up to 1": (
                lambda s: torch.special.entr(s).sum().exp()
            ),
            "check the sign: entropy is minus the sum of p log p": lambda s: (-entropy(s)).exp(),
            "that counts how many are not zero; their sizes matter": lambda s: (s > 0).sum(),
        },
        inputs,
    )


def random_matrix() -> torch.Tensor:
    """(m, n), never square, with well-separated singular values."""
    m, n = random.choice([(7, 5), (5, 7), (9, 7), (7, 9)])
    left, right = (torch.linalg.qr(torch.randn(size, min(m, n))).Q for size in (m, n))
    s = torch.arange(min(m, n), 0, -1) * (1 + 0.2 * torch.rand(min(m, n)))
    return (left * s) @ right.T


def keep_largest(function: Callable) -> None:
    """`function(matrix, k)`: the nearest matrix of rank k, of the same shape."""

    def cut(matrix, which, s_power=1):
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return (U[:, which] * s[which] ** s_power) @ Vh[which]

    def of_V(matrix, k, wrong):
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return (U[:, :k] * s[:k]) @ wrong(Vh)

    def without_columns(matrix, k):
        kept = torch.zeros_like(matrix)
        kept[:, :k] = matrix[:, :k]
        return kept

    compare(
        "keep_largest",
        function,
        lambda m, k: cut(m, slice(0, k)),
        {
            "that keeps the k *smallest*: singular values come in falling order, the largest first": (
                lambda m, k: cut(m, slice(-k, None))
            ),
            "that removes the k largest and keeps the rest": lambda m, k: cut(m, slice(k, None)),
            "that keeps k + 1 directions": lambda m, k: cut(m, slice(0, k + 1)),
            "that keeps one direction too few": lambda m, k: cut(m, slice(0, k - 1)),
            "the singular values are missing: U times Vh alone makes every direction equally large": (
                lambda m, k: cut(m, slice(0, k), 0)
            ),
            "the singular values were multiplied in twice": lambda m, k: cut(m, slice(0, k), 2),
            "torch.linalg.svd gives Vh, whose *rows* are the directions: take Vh[:k], without a transpose; yours "
            "looks like V's first k columns": lambda m, k: of_V(m, k, lambda Vh: Vh[:, :k].T),
            "torch.linalg.svd gives Vh, whose *rows* are the directions: take Vh[:k] as it is, not its columns": (
                lambda m, k: of_V(m, k, lambda Vh: Vh[:, :k])
            ),
            "Vh is transposed already: take Vh[:k] as it is, (k, n)": lambda m, k: of_V(
                m, k, lambda Vh: Vh[:k].T
            ),
            "those are the first k columns of the matrix; its directions are in U and Vh": without_columns,
            "that is the whole matrix: nothing was left out": lambda m, k: m,
        },
        lambda: (random_matrix(), random.randint(2, 3)),
    )


def similarity(function: Callable) -> None:
    """`function(first, second)`: phi of the spans of all columns of `first` (d, i) and of `second` (d, j)."""

    def inputs():
        i, j = random.choice([(2, 5), (5, 2), (3, 6), (6, 3)])
        return tuple(torch.linalg.qr(torch.randn(12, columns)).Q for columns in (i, j))

    def overlap(first, second):
        return ((first.T @ second) ** 2).sum()

    def sides(first, second):
        return first.shape[1], second.shape[1]

    compare(
        "similarity",
        function,
        lambda a, b: overlap(a, b) / min(sides(a, b)),
        {
            "divide by min(i, j), not max: a span inside a larger one has similarity 1": (
                lambda a, b: overlap(a, b) / max(sides(a, b))
            ),
            "the result must lie between 0 and 1: divide by min(i, j)": overlap,
            "the Frobenius norm should be squared": lambda a, b: overlap(a, b).sqrt() / min(sides(a, b)),
            "divide by min(i, j), not by its root, once the norm is squared": (
                lambda a, b: overlap(a, b) / math.sqrt(min(sides(a, b)))
            ),
            "divide by min(i, j), not by i j: that would be the mean of the squared cosines": (
                lambda a, b: overlap(a, b) / math.prod(sides(a, b))
            ),
            "divide by min(i, j), not by the length d of the directions": lambda a, b: overlap(a, b) / len(a),
            "that is the largest cosine alone; all pairs count": lambda a, b: (a.T @ b).abs().max(),
        },
        inputs,
    )


def factored_singular_values(function: Callable) -> None:
    """`function(B, A, scaling)`: the r singular values of scaling B A, falling; B (out, r), A (r, in)."""

    def inputs():
        r = random.randint(2, 4)
        return torch.randn(9, r), torch.randn(r, 12), random.choice([0.25, 2.0, 4.0])

    def values(matrix):
        return torch.linalg.svdvals(matrix)

    compare(
        "factored_singular_values",
        function,
        lambda B, A, scaling: scaling * values(B @ A)[: len(A)],
        {
            "the scaling is missing: the update is scaling B A": lambda B, A, c: values(B @ A)[: len(A)],
            "those are all of them, with zeros at the end: decompose the r x r matrix, not the product": (
                lambda B, A, c: c * values(B @ A).where(torch.arange(9) < len(A), torch.zeros(()))
            ),
            "singular values of a product are not the products of singular values": (
                lambda B, A, c: c * values(B) * values(A)
            ),
            "the R on A's side must be transposed: A^T = Q R, so A = R^T Q^T": (
                lambda B, A, c: c * values(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R)
            ),
            "those are the squares; take the root": lambda B, A, c: (c * values(B @ A)[: len(A)]) ** 2,
            "the scaling counts once: singular values grow with the matrix, only energy with its square": (
                lambda B, A, c: c**2 * values(B @ A)[: len(A)]
            ),
            "they must fall, the largest first": lambda B, A, c: (c * values(B @ A)[: len(A)]).flip(0),
            "those are the singular values of B alone; A matters too": lambda B, A, c: c * values(B),
        },
        inputs,
    )


def count_intruders(function: Callable) -> None:
    """`function(before, after, epsilon)`: how many columns of `after` (d, k) have a |cosine| below epsilon
    with every column of `before` (d, n).
    """

    def inputs():
        before = torch.linalg.qr(torch.randn(16, 16)).Q
        known = -before[:, [0, 1, 9]]  # with the sign flipped, and the third in another place
        known[:, 0] = 0.8 * known[:, 0] + 0.6 * before[:, 7]  # turned, but not far enough
        evenly = (before @ hadamard(16))[:, : random.choice([4, 5, 6])]  # cosine 1/4 with every direction
        return before, torch.cat([known, evenly], dim=1), 0.5

    def cosines(before, after):
        return (before.T @ after).abs()

    compare(
        "count_intruders",
        function,
        lambda b, a, e: (cosines(b, a).amax(dim=0) < e).sum(),
        {
            "a direction and its negative are the same singular vector: take the absolute value of the cosine": (
                lambda b, a, e: ((b.T @ a).amax(dim=0) < e).sum()
            ),
            "compare with *all* directions of the base, not only with the one of the same number": (
                lambda b, a, e: ((b[:, : a.shape[1]] * a).sum(0).abs() < e).sum()
            ),
            "an intruder is unlike *every* direction: its largest cosine is small. Yours looks at the smallest": (
                lambda b, a, e: (cosines(b, a).amin(dim=0) < e).sum()
            ),
            "that counts the directions that are *not* intruders": (
                lambda b, a, e: (cosines(b, a).amax(dim=0) >= e).sum()
            ),
            "that counts directions of the base that were lost; look at each column of `after`": (
                lambda b, a, e: (cosines(b, a).amax(dim=1) < e).sum()
            ),
            "that counts pairs; a column of `after` counts once": lambda b, a, e: (cosines(b, a) < e).sum(),
            "that is a mask or a list; how many are there?": lambda b, a, e: cosines(b, a).amax(dim=0) < e,
        },
        inputs,
    )


def hadamard(size: int) -> torch.Tensor:
    """Orthogonal (size, size), every element ±1/sqrt(size); its columns lie evenly between the axes."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix
