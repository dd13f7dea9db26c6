"""Checks of the exercises on the family of LoRA."""

import math
import random
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from labkit.lab.check.compare import compare


def rslora_scaling(function: Callable) -> None:
    """`function(alpha, r, stabilized)`: the factor of the correction of LoRA, or of rsLoRA."""
    kinds = cycle([True, False])  # both come up, whatever the luck

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
            "rsLoRA divides by sqrt(r), and yours multiplies by it": (
                lambda a, r, s: a * math.sqrt(r) if s else a / r
            ),
            "alpha is missing": lambda a, r, s: right(1, r, s),
        },
        lambda: (random.choice([6.0, 12.0, 20.0]), random.choice([5, 7, 10, 24, 50]), next(kinds)),
    )


def dora_forward(function: Callable) -> None:
    """`function(x, W, A, B, m, s)`: x (n, in), W (out, in), A (r, in), B (out, r), m (out,), s to (n, out)."""

    def inputs():
        d, r = random.randint(5, 9), random.randint(2, 3)
        # square, so that norms of the wrong side fit and must be told apart by their values
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
            "the norms are those of W + s B A, now; yours are those of W alone, as at the start": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * (m / W.norm(dim=1))
            ),
            "m/n stretches the correction too; yours stretches the base alone": lambda x, W, A, B, m, s: (
                x @ W.T * (m / (W + s * B @ A).norm(dim=1)) + s * x @ A.T @ B.T
            ),
            "m/n stretches the base too; yours stretches the correction alone": lambda x, W, A, B, m, s: (
                x @ W.T + s * x @ A.T @ B.T * (m / (W + s * B @ A).norm(dim=1))
            ),
            "those are norms of columns; m has one number for each *row* of (out, in): norm(dim=1)": (
                lambda x, W, A, B, m, s: x @ (W + s * B @ A).T * (m / (W + s * B @ A).norm(dim=0))
            ),
            "one norm for the whole matrix; each row has its own": lambda x, W, A, B, m, s: (
                x @ (W + s * B @ A).T * (m / (W + s * B @ A).norm())
            ),
            "m multiplies a *direction*: divide each row by its norm first": lambda x, W, A, B, m, s: (
                x @ (W + s * B @ A).T * m
            ),
            "that divides by the norms and forgets m": lambda x, W, A, B, m, s: (
                x @ (W + s * B @ A).T / (W + s * B @ A).norm(dim=1)
            ),
            "that is LoRA's forward; m is not in it": lambda x, W, A, B, m, s: x @ (W + s * B @ A).T,
            "the scaling s is missing": lambda x, W, A, B, m, s: right(x, W, A, B, m, 1.0),
            "m and n are the wrong way round: m/n": lambda x, W, A, B, m, s: (
                x @ (W + s * B @ A).T * ((W + s * B @ A).norm(dim=1) / m)
            ),
        },
        inputs,
    )


def pissa_split(function: Callable) -> None:
    """`function(W, r, s)`: W (out, in) to A (r, in), B (out, r) and the frozen rest, (out, in)."""

    def inputs():
        out, width = random.sample(range(6, 11), 2)
        U, S, Vh = torch.linalg.svd(torch.randn(out, width), full_matrices=False)
        W = (U * torch.linspace(3, 0.5, len(S))) @ Vh  # no two alike: their vectors would be anybody's choice
        return W, random.randint(2, 3), random.choice([0.5, 2.0, 3.0])

    def factors(W, r, s, first=0):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[first : first + r] / s).sqrt()
        return root[:, None] * Vh[first : first + r], U[:, first : first + r] * root

    def with_rest(W, s, A, B):
        return A, B, W - s * B @ A

    def right(W, r, s):
        return with_rest(W, s, *factors(W, r, s))

    def uneven(W, r, s):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return with_rest(W, s, S[:r, None] / s * Vh[:r], U[:, :r])

    def flat(answer):
        """Shapes, and what does not depend on sign or order of singular vectors; what is no triple stays as it is."""
        if not (
            isinstance(answer, (tuple, list))
            and len(answer) == 3
            and all(map(torch.is_tensor, answer))
            and all(part.dim() == 2 for part in answer)
        ):
            return answer
        A, B, rest = (part.detach().double() for part in answer)
        shapes = torch.tensor([side for part in (A, B, rest) for side in part.shape]).double()
        product = B @ A if B.shape[1] == len(A) else torch.zeros(0)
        sizes = [t.sort().values for t in (A.square().sum(1), B.square().sum(0))]
        return torch.cat([shapes, product.flatten(), rest.flatten(), *sizes])

    compare(
        "pissa_split",
        lambda *inputs: flat(function(*inputs)),
        lambda *inputs: flat(right(*inputs)),
        {
            "the layer multiplies B A by s: divide the singular values by s, or the start is s times too large": (
                lambda W, r, s: flat(with_rest(W, s, *factors(W, r, 1.0)))
            ),
            "the layer multiplies B A by s; yours forgets s in the factors and in the rest": lambda W, r, s: (
                flat(with_rest(W, 1.0, *factors(W, r, 1.0)))
            ),
            "the rest is W - s B A; yours forgets s there": lambda W, r, s: flat(
                with_rest(W, 1.0, *factors(W, r, s))
            ),
            "the frozen part is W still, so that the largest directions count twice": lambda W, r, s: flat(
                (*factors(W, r, s), W)
            ),
            "those are the smallest singular values; PiSSA trains the largest": lambda W, r, s: flat(
                with_rest(W, s, *factors(W, r, s, min(W.shape) - r))
            ),
            "the product is right, but one factor has all of the singular values; each gets the square root": (
                lambda W, r, s: flat(uneven(W, r, s))
            ),
            "A and B are swapped: A (r, in) comes first": lambda W, r, s: flat(
                (*reversed(factors(W, r, s)), W - s * factors(W, r, s)[1] @ factors(W, r, s)[0])
            ),
        },
        inputs,
    )


def lora_plus_rates(function: Callable) -> None:
    """`function(names, lr, ratio)`: the learning rate of each parameter in the list `names`, a list."""
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
            "that gives A the higher rate; it is B's": rates(
                lambda n, lr, k: k * lr if n.endswith("lora_A") else lr
            ),
            "everything but A has the higher rate; it is for B alone, not for magnitudes or heads": rates(
                lambda n, lr, k: lr if n.endswith("lora_A") else k * lr
            ),
            "A and B both have the higher rate; then it is LoRA at another rate": rates(
                lambda n, lr, k: k * lr if "lora_A" in n or "lora_B" in n else lr
            ),
            "B's rate is ratio times lr; yours divides": rates(
                lambda n, lr, k: lr / k if n.endswith("lora_B") else lr
            ),
            "B keeps lr and the others get less; here lr is A's, and B's is higher": rates(
                lambda n, lr, k: lr if n.endswith("lora_B") else lr / k
            ),
            "that is one rate for all": rates(lambda n, lr, k: lr),
            "that is the ratio; multiply by lr": rates(lambda n, lr, k: right(n, 1.0, k)),
        },
        inputs,
    )


def plain_factors(function: Callable) -> None:
    """`function(A, B, A0, B0)`: a trained PiSSA adapter and its start to one of LoRA on the original weight, (A', B')."""

    def inputs():
        out, width, r = random.sample(range(3, 9), 3)
        return (torch.randn(r, width), torch.randn(out, r), torch.randn(r, width), torch.randn(out, r))

    def right(A, B, A0, B0):
        return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)

    def flat(answer):
        """The ranks and the product: factors are right in any order and with any sign."""
        if not (isinstance(answer, (tuple, list)) and len(answer) == 2 and all(map(torch.is_tensor, answer))):
            return answer
        A, B = (part.detach().double() for part in answer)
        if A.dim() != 2 or B.dim() != 2:
            return answer
        shapes = torch.tensor([*A.shape, *B.shape]).double()
        product: Tensor = B @ A if B.shape[1] == len(A) else torch.zeros(0)
        return torch.cat([shapes, product.flatten()])

    def pair(first: Callable, second: Callable) -> Callable:
        return lambda *given: flat((first(*given), second(*given)))

    def wide(A, B, A0, B0):
        return torch.cat([A, A0])

    compare(
        "plain_factors",
        lambda *inputs: flat(function(*inputs)),
        lambda *inputs: flat(right(*inputs)),
        {
            "a difference of products is no product of differences: (B - B0)(A - A0) has terms that nobody wants": pair(
                lambda A, B, A0, B0: A - A0, lambda A, B, A0, B0: B - B0
            ),
            "a minus is missing, or there is one in both factors, which makes a plus: the original is W = rest + B0 A0": pair(
                wide, lambda A, B, A0, B0: torch.cat([B, B0], dim=1)
            ),
            "the signs are the wrong way round: B A - B0 A0": pair(
                wide, lambda A, B, A0, B0: torch.cat([-B, B0], dim=1)
            ),
            "that is the adapter as it was trained, on a base that nobody else has": lambda A, B, A0, B0: (
                flat((A, B))
            ),
            "the order differs between the two: B' must begin with B where A' begins with A": pair(
                wide, lambda A, B, A0, B0: torch.cat([-B0, B], dim=1)
            ),
            "B' is swapped with A': A' (2r, in) comes first": lambda *given: flat(
                tuple(reversed(right(*given)))
            ),
        },
        inputs,
    )
