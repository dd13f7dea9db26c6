"""Checks of the exercises on the variants of LoRA: rsLoRA, DoRA, PiSSA and LoRA+."""

import math
import random
from collections.abc import Callable
from itertools import cycle

import torch

from labkit.lab.check.compare import compare


def is_matrices(answer, number: int) -> bool:
    """Is `answer` a tuple or list of that many matrices?"""
    sequence = isinstance(answer, (tuple, list)) and len(answer) == number
    return sequence and all(torch.is_tensor(part) and part.dim() == 2 for part in answer)


def rslora_scaling(function: Callable) -> None:
    """`function(alpha, r, stabilized)`: the factor that LoRA's correction is multiplied by, or rsLoRA's."""
    kinds = cycle([True, False])  # both are tried, whatever the luck

    def right(alpha: float, r: int, stabilized: bool) -> float:
        return alpha / (math.sqrt(r) if stabilized else r)

    compare(
        "rslora_scaling",
        function,
        right,
        {
            "that is alpha / r in both cases; rsLoRA divides by sqrt(r)": lambda a, r, s: a / r,
            "that is alpha / sqrt(r) in both cases; LoRA divides by r": lambda a, r, s: a / math.sqrt(r),
            "the two are swapped: rsLoRA has the square root": lambda a, r, s: right(a, r, not s),
            "the root is of r alone, not of alpha / r": lambda a, r, s: math.sqrt(a / r) if s else a / r,
            "rsLoRA divides by sqrt(r); yours multiplies by it": (
                lambda a, r, s: a * math.sqrt(r) if s else a / r
            ),
            "alpha is missing": lambda a, r, s: right(1, r, s),
        },
        lambda: (random.choice([6.0, 12.0, 20.0]), random.choice([5, 7, 10, 24, 50]), next(kinds)),
    )


def dora_forward(function: Callable) -> None:
    """`function(x, W, A, B, m, s)`: x (n, in), W (out, in), A (r, in), B (out, r), m (out,) to (n, out)."""

    def inputs():
        d, r = random.randint(5, 9), random.randint(2, 3)
        # square, so norms along the wrong side have the right shape too, and only their values give them away
        x, W, A, B = torch.randn(4, d), torch.randn(d, d), torch.randn(r, d), torch.randn(d, r)
        return x, W, A, B, torch.rand(d) + 0.5, random.choice([0.5, 2.0, 3.0])

    def right(x, W, A, B, m, s):
        V = W + s * B @ A
        return x @ V.T * (m / V.norm(dim=1))

    compare(
        "dora_forward",
        function,
        right,
        {
            "the norms should be those of W + s B A, as it is now; yours are those of W alone, as at the start": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * (m / W.norm(dim=1))
            ),
            "m/n stretches the correction too; yours stretches the base alone": (
                lambda x, W, A, B, m, s: x @ W.T * (m / (W + s * B @ A).norm(dim=1)) + s * x @ A.T @ B.T
            ),
            "m/n stretches the base too; yours stretches the correction alone": (
                lambda x, W, A, B, m, s: x @ W.T + s * x @ A.T @ B.T * (m / (W + s * B @ A).norm(dim=1))
            ),
            "those are norms of columns; m has one number for each *row* of (out, in): norm(dim=1)": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * (m / (W + s * B @ A).norm(dim=0))
            ),
            "that is one norm for the whole matrix; each row has its own": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * (m / (W + s * B @ A).norm())
            ),
            "m multiplies a *direction*: divide each row by its norm first": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * m
            ),
            "that divides by the norms but forgets m": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T / (W + s * B @ A).norm(dim=1)
            ),
            "that is LoRA's forward; m is not in it": lambda x, W, A, B, m, s: x @ (W + s * B @ A).T,
            "the scaling s is missing": lambda x, W, A, B, m, s: right(x, W, A, B, m, 1.0),
            "m and n are the wrong way round: it is m/n": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * ((W + s * B @ A).norm(dim=1) / m)
            ),
        },
        inputs,
    )


def pissa_split(function: Callable) -> None:
    """`function(W, r, s)`: W (out, in) to A (r, in), B (out, r) and the frozen rest, (out, in)."""

    def inputs():
        out, width = random.sample(range(6, 11), 2)
        U, S, Vh = torch.linalg.svd(torch.randn(out, width), full_matrices=False)
        W = (U * torch.linspace(3, 0.5, len(S))) @ Vh  # no two are equal: their vectors would not be unique
        return W, random.randint(2, 3), random.choice([0.5, 2.0, 3.0])

    def factors(W, r, s, first=0):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[first : first + r] / s).sqrt()
        return root[:, None] * Vh[first : first + r], U[:, first : first + r] * root

    def with_rest(W, s, A, B):
        return A, B, W - s * B @ A

    def right(W, r, s):
        return with_rest(W, s, *factors(W, r, s))

    def uneven(W, r, s, to_A):
        """A gets the power `to_A` of the singular values, B the rest."""
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        sizes = S[:r] / s
        return with_rest(W, s, sizes[:, None] ** to_A * Vh[:r], U[:, :r] * sizes ** (1 - to_A))

    def flat(answer):
        """What no sign or order of singular vectors changes; anything but three matrices stays as it is."""
        if not is_matrices(answer, 3):
            return answer
        A, B, rest = (part.detach().double() for part in answer)
        product = B @ A if B.shape[1] == len(A) else torch.zeros(0)
        sizes = [t.sort().values for t in (A.square().sum(1), B.square().sum(0))]
        return tuple(A.shape), tuple(B.shape), product, rest, *sizes

    compare(
        "pissa_split",
        lambda *inputs: flat(function(*inputs)),
        lambda *inputs: flat(right(*inputs)),
        {
            "the layer multiplies B A by s: divide the singular values by s, or the start is s times too large": (
                lambda W, r, s: flat(with_rest(W, s, *factors(W, r, 1.0)))
            ),
            "the layer multiplies B A by s; yours forgets s in the factors and in the rest": (
                lambda W, r, s: flat(with_rest(W, 1.0, *factors(W, r, 1.0)))
            ),
            "the rest is W - s B A; yours forgets s there": (
                lambda W, r, s: flat(with_rest(W, 1.0, *factors(W, r, s)))
            ),
            "the frozen part is still W, so the largest directions count twice": (
                lambda W, r, s: flat((*factors(W, r, s), W))
            ),
            "those are the smallest singular values; PiSSA trains the largest": (
                lambda W, r, s: flat(with_rest(W, s, *factors(W, r, s, min(W.shape) - r)))
            ),
            "the product is right, but A has all of the singular values; each factor should get their square roots": (
                lambda W, r, s: flat(uneven(W, r, s, 1))
            ),
            "the product is right, but B has all of the singular values; each factor should get their square roots": (
                lambda W, r, s: flat(uneven(W, r, s, 0))
            ),
            "A and B are swapped: A (r, in) comes first": (
                lambda W, r, s: flat((*reversed(factors(W, r, s)), right(W, r, s)[2]))
            ),
        },
        inputs,
        parts=(
            "A's shape",
            "B's shape",
            "B @ A",
            "the rest",
            "lengths² of A's rows",
            "lengths² of B's columns",
        ),
    )


def lora_plus_rates(function: Callable) -> None:
    """`function(names, lr, ratio)`: the list of learning rates of the parameters in the list `names`."""
    parts = ["lora_A", "lora_B", "lora_magnitude"]

    def inputs():
        names = [f"layers.{n}.q_proj.{part}" for n in range(2) for part in parts] + ["score.weight"]
        return random.sample(names, len(names)), random.choice([0.02, 0.05]), random.choice([4.0, 8.0, 16.0])

    def rates(wanted: Callable) -> Callable:
        return lambda names, lr, ratio: [wanted(name, lr, ratio) for name in names]

    def right(name: str, lr: float, ratio: float) -> float:
        return ratio * lr if name.endswith("lora_B") else lr

    compare(
        "lora_plus_rates",
        function,
        rates(right),
        {
            "that gives A the higher rate; it should be B's": rates(
                lambda n, lr, k: k * lr if n.endswith("lora_A") else lr
            ),
            "everything but A has the higher rate; it is for B alone, not for magnitudes or heads": rates(
                lambda n, lr, k: lr if n.endswith("lora_A") else k * lr
            ),
            "A and B both have the higher rate; that is LoRA at another rate": rates(
                lambda n, lr, k: k * lr if "lora_A" in n or "lora_B" in n else lr
            ),
            "B's rate is ratio times lr; yours divides": rates(
                lambda n, lr, k: lr / k if n.endswith("lora_B") else lr
            ),
            "B keeps lr and the others get less; here lr is A's rate, and B's is higher": rates(
                lambda n, lr, k: lr if n.endswith("lora_B") else lr / k
            ),
            "that is one rate for all": rates(lambda n, lr, k: lr),
            "that is the ratio; multiply by lr": rates(lambda n, lr, k: right(n, 1.0, k)),
        },
        inputs,
    )


def plain_factors(function: Callable) -> None:
    """`function(A, B, A0, B0)`: a trained PiSSA adapter and its start to (A', B'), on the original weight."""

    def inputs():
        out, width, r = random.sample(range(3, 9), 3)
        return (torch.randn(r, width), torch.randn(out, r), torch.randn(r, width), torch.randn(out, r))

    def right(A, B, A0, B0):
        return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)

    def flat(answer):
        """The shapes and the product: factors are right in any order and with any sign."""
        if not is_matrices(answer, 2):
            return answer
        A, B = (part.detach().double() for part in answer)
        return tuple(A.shape), tuple(B.shape), B @ A if B.shape[1] == len(A) else torch.zeros(0)

    def pair(first: Callable, second: Callable) -> Callable:
        return lambda *given: flat((first(*given), second(*given)))

    def wide(A, B, A0, B0):
        return torch.cat([A, A0])

    compare(
        "plain_factors",
        lambda *inputs: flat(function(*inputs)),
        lambda *inputs: flat(right(*inputs)),
        {
            "a difference of products is not a product of differences: (B - B0)(A - A0) has unwanted cross terms": pair(
                lambda A, B, A0, B0: A - A0, lambda A, B, A0, B0: B - B0
            ),
            "a minus is missing, or there is one in both factors, which makes a plus: the original is W = rest + B0 A0": (
                pair(wide, lambda A, B, A0, B0: torch.cat([B, B0], dim=1))
            ),
            "the signs are the wrong way round: B A - B0 A0": pair(
                wide, lambda A, B, A0, B0: torch.cat([-B, B0], dim=1)
            ),
            "that is the adapter as it was trained, on a base that nobody else has": (
                lambda A, B, A0, B0: flat((A, B))
            ),
            "the order differs between the two: if A' begins with A, B' must begin with B": pair(
                wide, lambda A, B, A0, B0: torch.cat([-B0, B], dim=1)
            ),
            "A' and B' are swapped: A' (2r, in) comes first": lambda *given: flat(right(*given)[::-1]),
        },
        inputs,
        parts=("the shape of A'", "the shape of B'", "B' @ A'"),
    )
