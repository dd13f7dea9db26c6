"""The best approximation of a matrix by factors of low rank, by SVD, and the rank that an energy asks for.

The energy of a matrix is the sum of its squared singular values, which is its squared norm: what a rank keeps of
it, no other factors of that rank keep more of (Eckart and Young). A matrix that is given by its factors is
never multiplied out: Q R decompositions of both leave a small square matrix, whose SVD is that of the product.

All is computed in float64: the factors are right to the last bits of fp32.
"""

import torch
from torch import Tensor

from labkit.checks import check_whole, is_number

ROUNDING = 1e-24  # of the energy: singular values below it are those of rounding errors, not of the matrix


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and V^T (k, in) of a dense matrix (out, in), in float64."""
    return torch.linalg.svd(matrix.detach().double(), full_matrices=False)


def decompose_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of B A, from its factors A (k, in) and B (out, k)."""
    left, upper = torch.linalg.qr(B.detach().double())
    right, lower = torch.linalg.qr(A.detach().double().T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ U, S, Vh @ right.T


def truncate(parts: tuple[Tensor, Tensor, Tensor], r: int) -> tuple[Tensor, Tensor]:
    """Factors A (r, in) and B (out, r) in fp32 of the best approximation of rank r, each with half of every S."""
    U, S, Vh = parts
    root = S[:r].sqrt()
    return (root[:, None] * Vh[:r]).float(), (U[:, :r] * root).float()


def rank_for(S: Tensor, r: int | None = None, energy: float | None = None) -> int:
    """The smallest rank that keeps a share `energy` of the squares of S, and at most r; at least 1.

    >>> rank_for(torch.tensor([3.0, 1.0, 1.0]), energy=0.9)
    2
    """
    most = len(S) if r is None else min(r, len(S))
    if energy is not None:
        squares = S.double().square()
        # what is left out, from the smallest up, is exact where the sum from the largest down is not
        left_out = squares.flip(0).cumsum(0).flip(0)
        most = min(most, int((left_out > max(1 - energy, ROUNDING) * squares.sum()).sum()))
    return max(1, most)


def check_rank(r: object, energy: object) -> None:
    """Raise a `ValueError` unless r is a rank or None, and energy a share or None."""
    if r is not None:
        check_whole("r", r, usual="8 or 16 is usual")
    if energy is not None and (not is_number(energy) or not 0 < energy <= 1):
        raise ValueError(
            f"energy={energy!r} must be a number above 0 and at most 1: the share of the squared update that "
            "is kept; 0.95 is usual"
        )
