"""Losses of batch statistics as functions of means over the batch: of values, squares and products of the embeddings.

Means are flat vectors (P,), the mean over records of what `*_moments` returns for each. With n records they give the
losses of `fedssl.losses.statistics` and `fedssl.losses.pairwise`, whose definitions and sources hold here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.losses.similarity import wide


def outer(a: Tensor, b: Tensor) -> Tensor:
    """(B, K * K) products a_i b_j of each row."""
    return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)


def vicreg_moments(z1: Tensor, z2: Tensor) -> Tensor:
    """(B, 2 K + 2 K^2): both views and their products with themselves."""
    z1, z2 = wide(z1), wide(z2)
    return torch.cat([z1, z2, outer(z1, z1), outer(z2, z2)], dim=1)


def _covariances(s: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Both views' means (K,) and biased covariances (K, K), from VICReg's means."""
    k = math.isqrt(len(s) // 2)  # 2 K + 2 K^2 lies between 2 K^2 and 2 (K + 1)^2
    means = [s[:k], s[k : 2 * k]]
    seconds = [s[2 * k : 2 * k + k * k].view(k, k), s[2 * k + k * k :].view(k, k)]
    return means, [second - mean.outer(mean) for mean, second in zip(means, seconds, strict=True)]


def vicreg_of(s: Tensor, n: int, *, variance: float, covariance: float) -> Tensor:
    """(), VICReg's variance and covariance terms, weighted, at means (2 K + 2 K^2,) of n records."""
    _, found = _covariances(s)
    total = s.new_zeros(())
    for biased in found:
        matrix = biased * (n / max(n - 1, 1))
        spread = F.relu(1 - (matrix.diagonal() + 1e-4).sqrt()).mean()
        shared = (matrix.square().sum() - matrix.diagonal().square().sum()) / len(matrix)
        total = total + variance / 2 * spread + covariance * shared
    return total


def vicreg_settled(s: Tensor) -> Tensor:
    """Noisy means of VICReg whose covariances are made symmetric and positive semi-definite."""
    means, found = _covariances(s)
    seconds = [positive(matrix) + mean.outer(mean) for mean, matrix in zip(means, found, strict=True)]
    return torch.cat([*means, *(second.flatten() for second in seconds)])


def positive(matrix: Tensor) -> Tensor:
    """The nearest symmetric positive semi-definite matrix (K, K) in the Frobenius norm."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    nearest: Tensor = (vectors * values.clamp(min=0)) @ vectors.T
    return nearest


def barlow_moments(z1: Tensor, z2: Tensor) -> Tensor:
    """(B, 4 K + K^2): both views, their squares, and the products of one with the other."""
    z1, z2 = wide(z1), wide(z2)
    return torch.cat([z1, z2, z1.square(), z2.square(), outer(z1, z2)], dim=1)


def _crossed(s: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Means (K,), biased variances (K,) and the cross-covariance (K, K), from Barlow Twins' means."""
    k = math.isqrt(len(s) + 4) - 2  # 4 K + K^2
    means, squares = [s[:k], s[k : 2 * k]], [s[2 * k : 3 * k], s[3 * k : 4 * k]]
    variances = [square - mean.square() for mean, square in zip(means, squares, strict=True)]
    return means, variances, s[4 * k :].view(k, k) - means[0].outer(means[1])


def barlow_of(s: Tensor, *, off_diagonal: float) -> Tensor:
    """(), Barlow Twins' loss at means (4 K + K^2,)."""
    _, (first, second), shared = _crossed(s)
    matrix = shared / ((first + 1e-5).sqrt().outer((second + 1e-5).sqrt()))
    on = (1 - matrix.diagonal()).square().sum()
    return on + off_diagonal * (matrix.square().sum() - matrix.diagonal().square().sum())


def barlow_settled(s: Tensor) -> Tensor:
    """Noisy means of Barlow Twins whose variances are at least 0 and whose correlations lie in [-1, 1]."""
    means, variances, shared = _crossed(s)
    first, second = (variance.clamp(min=0) for variance in variances)
    bound = first.outer(second).sqrt()
    crossed = shared.clamp(-bound, bound) + means[0].outer(means[1])
    squares = [v + mean.square() for v, mean in zip((first, second), means, strict=True)]
    return torch.cat([*means, *squares, crossed.flatten()])


def spectral_moments(z1: Tensor, z2: Tensor) -> Tensor:
    """(B, 2 K^2): the products of each view with itself."""
    z1, z2 = wide(z1), wide(z2)
    return torch.cat([outer(z1, z1), outer(z2, z2)], dim=1)


def spectral_own(z1: Tensor, z2: Tensor, n: int) -> Tensor:
    """(B,), spectral contrast's pairs of a record with itself: the positive, and what `spectral_of` counts too much."""
    inner = (wide(z1) * wide(z2)).sum(1)
    return -2 * inner - inner.square() / max(n - 1, 1)


def spectral_of(s: Tensor, n: int) -> Tensor:
    """(), the mean square of the products of all pairs of different records, and of each with itself."""
    first, second = s.chunk(2)
    return (first * second).sum() * (n / max(n - 1, 1))


def spectral_settled(s: Tensor) -> Tensor:
    """Noisy means of spectral contrast made symmetric and positive semi-definite."""
    k = math.isqrt(len(s) // 2)
    return torch.cat([positive(half.view(k, k)).flatten() for half in s.chunk(2)])
