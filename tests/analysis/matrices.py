"""Matrices with a known spectrum."""

import torch


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def orthonormal(d, k, seed=0):
    return torch.linalg.qr(gaussian(d, k, seed)).Q


def with_spectrum(m, n, s, seed=0):
    """An (m, n) matrix with exactly these singular values."""
    s = torch.as_tensor(s, dtype=torch.float32)
    return (orthonormal(m, len(s), seed) * s) @ orthonormal(n, len(s), seed + 1).T
