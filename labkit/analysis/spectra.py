"""In how many directions did training change the weights? Singular values of updates, with controls.

    dW = W_tuned - W_0 = U diag(s) V^T            U: (out, r)   s: (r,) falling   V^T: (r, in)

Low rank means that few of the s carry most of dW. How few, no single number says:

- `effective_rank`: exp of the entropy of s / sum(s). The tail counts.
- `stable_rank`: ||dW||_F^2 / ||dW||_2^2. Only the largest counts.
- `energy_rank`: singular values that make up 90 % of ||dW||_F^2.

None means anything without a control: Gaussian noise of 256 x 256 has 90 % of its energy in 130 directions,
so compare with `gaussian_like`. And energy is not effect: `with_truncated_update` keeps the k largest
directions in the model, so the loss can be measured.

Sources: LoRA (Hu et al. 2021) section 7; Roy & Vetterli 2007; Shuttleworth et al. 2024, arXiv 2410.21228.
Agrees with: numpy.linalg.svd.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from labkit.analysis.updates import Factored, at_least_fp32, with_update


class SVD(NamedTuple):
    """U (m, r), s (r,) falling, Vh (r, n): the matrix is `U @ diag(s) @ Vh`."""

    U: Tensor
    s: Tensor
    Vh: Tensor


Matrix: TypeAlias = Tensor | Factored | SVD


def checked(matrix: Tensor) -> Tensor:
    """`matrix` in at least fp32.

    Raises:
        ValueError: it is not two-dimensional, is empty, or has a NaN or an infinity.
    """
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.numel():
        given = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"a matrix of two dimensions and at least one element is needed, not {given}")
    if not matrix.isfinite().all():
        raise ValueError(
            f"the matrix has {(~matrix.isfinite()).sum()} values that are NaN or infinite; did the training diverge?"
        )
    return at_least_fp32(matrix.detach())


def svd(matrix: Matrix) -> SVD:
    """The singular value decomposition, exact: of a tensor, or of a `Factored` without multiplying it out.

    With left = Q_l R_l and right^T = Q_r R_r, left right = Q_l (R_l R_r^T) Q_r^T, and the bracket is only
    (r, r). That is why a LoRA update (scaling B) A is never multiplied out: at 1024 x 1024 and r = 16 this
    takes a thousandth of the time of the SVD of the product.

    Raises:
        ValueError: see `checked`.
    """
    if isinstance(matrix, SVD):
        return matrix
    if not isinstance(matrix, Factored):
        return SVD(*torch.linalg.svd(checked(matrix), full_matrices=False))
    left, right = torch.linalg.qr(checked(matrix.left)), torch.linalg.qr(checked(matrix.right).T)
    U, s, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return SVD(left.Q @ U, s, Vh @ right.Q.T)


def randomized_svd(
    matrix: Tensor, k: int, oversample: int = 8, powers: int = 2, seed: int = 0
) -> tuple[SVD, float]:
    """The k largest singular values and vectors, from products with k + oversample random directions.

    Q spans (A A^T)^powers A Omega, and B = Q^T A is decomposed instead of A. It pays if k is far below both
    sides: 16 of 1024 x 1024 took a twentieth of the time of the exact one.

    Returns:
        (svd, bound). With E = A - Q B, A^T A = B^T B + E^T E, so each true singular value lies between s_j
        and sqrt(s_j^2 + ||E||^2). `bound` is ||E||_F, which is at least ||E||: look at it before you use s.
        For noise, which has no low rank, it is nearly the norm of the matrix.

    Raises:
        ValueError: see `checked`, or k is below 1 or above the smaller side.
    """
    matrix = checked(matrix)
    m, n = matrix.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k={k} singular values of a {m} x {n} matrix; choose 1 to {min(m, n)}")
    generator = torch.Generator().manual_seed(seed)

    def random(columns: int) -> Tensor:
        return torch.randn(n, columns, generator=generator, dtype=matrix.dtype).to(matrix.device)

    Q = torch.linalg.qr(matrix @ random(min(k + oversample, m, n))).Q  # (m, k + oversample)
    for _ in range(
        powers
    ):  # orthonormal in between: rounding would swallow the powers of small singular values
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, s, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    bound = (matrix - Q @ (Q.T @ matrix)).norm().item()
    return SVD((Q @ U)[:, :k], s[:k], Vh[:k]), bound


def singular_values(matrix: Matrix) -> Tensor:
    """(r,) falling. Raises: ValueError, see `checked`."""
    return torch.linalg.svdvals(checked(matrix)) if isinstance(matrix, Tensor) else svd(matrix).s


def spectrum(s: Tensor) -> Tensor:
    """`s` as float64.

    Raises:
        ValueError: it is not a list of singular values, or all of them are zero.
    """
    if s.dim() != 1 or not s.numel() or not s.isfinite().all() or (s < 0).any():
        raise ValueError(
            f"singular values are a list of finite numbers of at least 0, not a tensor of shape {tuple(s.shape)}; "
            "call singular_values(matrix) first"
        )
    if not s.any():
        raise ValueError(
            "all singular values are zero, so there is no rank to speak of; was anything trained?"
        )
    return s.double()


def effective_rank(s: Tensor) -> float:
    """exp(-sum p log p) with p = s / sum(s): n for n equal singular values (Roy & Vetterli 2007). s: (r,)."""
    s = spectrum(s)
    return torch.special.entr(s / s.sum()).sum().exp().item()


def stable_rank(s: Tensor) -> float:
    """||.||_F^2 / ||.||_2^2 = sum(s^2) / max(s)^2, from 1 up to the rank. s: (r,)."""
    s = spectrum(s)
    return ((s / s.max()) ** 2).sum().item()


def energy_rank(s: Tensor, share: float = 0.9) -> int:
    """The smallest number of singular values whose squares make up `share` of all squares. s: (r,).

    Raises:
        ValueError: see `spectrum`, or a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} of the energy must be above 0 and at most 1")
    energy = (spectrum(s) ** 2).sort(descending=True).values.cumsum(0)
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def truncate(matrix: Matrix, k: int) -> Tensor:
    """The matrix of rank k nearest to `matrix`, (m, n): its k largest singular values (Eckart & Young 1936).

    Raises:
        ValueError: see `checked`, or k is negative. A k above the rank keeps everything.
    """
    if k < 0:
        raise ValueError(f"k={k} directions cannot be kept; 0 keeps none")
    U, s, Vh = svd(matrix)
    return (U[:, :k] * s[:k]) @ Vh[:k]


def random_directions(matrix: Tensor, k: int, seed: int) -> Tensor:
    """The control of `truncate`: `matrix`, (m, n), projected on k random directions of its smaller side.

    It has rank k, and keeps k / min(m, n) of the energy on average.
    """
    matrix = checked(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        return random_directions(matrix.T, k, seed).T
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(matrix.shape[0], min(k, matrix.shape[0]), generator=generator, dtype=matrix.dtype)
    Q = torch.linalg.qr(gaussian.to(matrix.device)).Q  # (m, k)
    return Q @ (Q.T @ matrix)


def gaussian_like(matrix: Tensor, seed: int) -> Tensor:
    """The control of every spectrum: normal noise of the same shape and Frobenius norm as `matrix`."""
    matrix = checked(matrix)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype).to(matrix.device)
    return noise * (matrix.norm() / noise.norm())


def mp_edge(m: int, n: int, std: float) -> float:
    """Where the singular values of an (m, n) matrix of independent entries of standard deviation `std` end.

    std (√m + √n) (Marchenko & Pastur 1967). A singular value of an update clearly above it is not noise.
    """
    return std * (math.sqrt(m) + math.sqrt(n))


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """How much of the span of the first i columns of `first` lies in that of the first j columns of `second`.

    phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j): 1 if one span contains the other, 0 if they are orthogonal
    (LoRA, equation 4).

    Args:
        first: (d, I), orthonormal columns, as `svd` gives them.
        second: (d, J), the same.

    Returns:
        (I, J); element [i - 1, j - 1] is phi(i, j). For random subspaces it is max(i, j) / d on average.

    Raises:
        ValueError: columns of different lengths, or that are not orthonormal.
    """
    for name, basis in (("first", first), ("second", second)):
        gram = checked(basis).T @ checked(basis)
        if (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max() > 1e-3:
            raise ValueError(f"the columns of {name} are not orthonormal; take singular vectors (U, or Vh.T)")
    if len(first) != len(second):
        raise ValueError(f"directions of {len(first)} and of {len(second)} numbers cannot be compared")
    overlap = (first.T.double() @ second.double()) ** 2  # (I, J)
    i, j = (torch.arange(1, size + 1, device=first.device) for size in overlap.shape)
    return (overlap.cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)).float()


def amplification(update: Matrix, weight: Tensor, r: int) -> float:
    """By how much training turned up what the weight already did in the update's r top singular directions.

    ||dW||_F / ||U^T W V||_F, with U and V these directions (LoRA, section 7.3). It grows with the size of dW:
    compare updates of one norm.

    Raises:
        ValueError: see `checked`, or r is below 1.
    """
    if r < 1:
        raise ValueError(f"r={r} directions; it must be at least 1")
    U, s, Vh = svd(update)
    there = U[:, :r].T @ checked(weight) @ Vh[:r].T  # (r, r)
    return (spectrum(s).norm() / there.double().norm()).item()


def intruder_dimensions(base: Matrix, tuned: Matrix, k: int = 10, epsilon: float = 0.5) -> list[int]:
    """Which of the k top left singular vectors of the tuned weight are unlike all of the base's.

    Those whose largest |cosine| to any of the base's is below `epsilon`, by number, from 0 up (arXiv
    2410.21228).

    Raises:
        ValueError: see `checked`, different numbers of rows, or an epsilon that cannot be a cosine.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon={epsilon} is compared with cosines; choose one above 0 and at most 1")
    before, after = svd(base).U, svd(tuned).U[:, :k]
    if len(before) != len(after):
        raise ValueError(f"weights of {len(before)} and {len(after)} rows are not of the same layer")
    likeness = (before.T @ after).abs().amax(dim=0)  # (k,)
    return (likeness < epsilon).nonzero()[:, 0].tolist()


def with_truncated_update(model: nn.Module, changes: Mapping[str, Matrix], k: int):
    """`with_update` of all `changes`, each cut to its k largest directions.

    Give them as {name: svd(update)} to decompose each only once.
    """
    return with_update(model, {name: truncate(change, k) for name, change in changes.items()})
