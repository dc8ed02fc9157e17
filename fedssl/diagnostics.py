"""Measures of collapse and drift: a matrix of features in, one number out, computed in float64.

Nothing here needs labels. Features that are not finite give `nan`, never an error, so that a run that diverged still
reports. Rank measures say how many directions the features use; compare them within one method and one dimension only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.errors import ConfigError

_BLOCK = 1 << 22  # pairs held at once by `uniformity`: 32 MiB of float64


def rankme(x: Tensor) -> float:
    """Counts the directions in use: the exponential of the entropy of `p = s / sum(s) + 1e-7`, uncentred.

    Args:
        x: (N, D) features; the paper finds 25,600 rows to be enough.

    Returns:
        About min(N, D) when all directions are used alike, 1 when all rows lie on one line (complete collapse). A
        matrix of zeros, which has no direction, gives 1. The 1e-7 adds about 1.6e-6 for each unused direction.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.

    References:
        Garrido et al. 2023, https://arxiv.org/abs/2210.02885
    """
    return _entropy_rank(_shares(x), eps=1e-7)


def effective_rank(x: Tensor) -> float:
    """Counts the directions in use as `rankme` does, without its 1e-7: the exact entropy of the singular values.

    Args:
        x: (N, D) features, uncentred.

    Returns:
        In [1, min(N, D)]; 1 means rank one, complete collapse, or a matrix of zeros.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.

    References:
        Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    return _entropy_rank(_shares(x), eps=0.0)


def ranks(x: Tensor) -> tuple[float, float]:
    """`rankme` and `effective_rank` for the price of one decomposition.

    Args:
        x: (N, D) features.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.
    """
    shares = _shares(x)
    return _entropy_rank(shares, eps=1e-7), _entropy_rank(shares, eps=0.0)


def participation_ratio(x: Tensor) -> float:
    """Counts the directions that carry the variance: `tr(C)^2 / tr(C^2)` of the centred covariance C.

    Args:
        x: (N, D) features.

    Returns:
        In [1, min(N - 1, D)]: D for white features, 1 when all variance lies along one line. Constant features and a
        single row, which have no variance, give 1 as well.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.
    """
    z = _matrix(x)
    if not _finite(z):
        return math.nan
    z = _scaled(_centred(z))
    total = z.square().sum()  # 1, or 0 without variance
    if total == 0:
        return 1.0
    return float(total.square() / _small_gram(z).square().sum())


def feature_std(x: Tensor) -> float:
    """Spreads of the directions of the features: the mean over columns of the std of L2-normalised rows.

    Args:
        x: (N, D) features.

    Returns:
        About 1 / sqrt(D) for healthy features (times sqrt(D) it is a gauge from 0 to 1), 0 when all rows point the same
        way (complete collapse), when there is one row, or when all rows are zero. The std divides by N - 1.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.

    References:
        Chen & He 2021, section 4.1, https://arxiv.org/abs/2011.10566
    """
    return feature_stds([x])[0]


def feature_stds(several: Sequence[Tensor]) -> list[float]:
    """`feature_std` of each of several matrices, of those of one shape at once."""
    found = dict.fromkeys(range(len(several)), math.nan)
    shapes: dict[torch.Size, list[int]] = {}
    for place, x in enumerate(several):
        shapes.setdefault(x.shape, []).append(place)
    for places in shapes.values():
        z = torch.stack([_matrix(several[place]) for place in places])
        z = _centred(_unit(z))  # a row that is not finite becomes nan, and with it all columns
        stds = (z.square().sum(-2) / max(z.shape[-2] - 1, 1)).sqrt().mean(-1)
        found.update(zip(places, stds.tolist(), strict=True))
    return list(found.values())


def alignment(x: Tensor, y: Tensor) -> float:
    """Measures how far two views of an example lie apart: the mean squared distance of L2-normalised pairs.

    Args:
        x: (N, D) features of the first view.
        y: (N, D) features of the second view, same order.

    Returns:
        In [0, 4]: 0 means equal directions (invariant or collapsed: see `uniformity` too), 2 unrelated, 4 opposite.

    Raises:
        ConfigError: x or y is not a matrix, or their shapes differ.

    References:
        Wang & Isola 2020 (alpha = 2), https://arxiv.org/abs/2005.10242
    """
    a, b = _matrix(x), _matrix(y)
    if a.shape != b.shape:
        raise ConfigError(
            f"The two views have the shapes {tuple(a.shape)} and {tuple(b.shape)}, so rows cannot be paired; pass both "
            "views of the same examples."
        )
    return float((_unit(a) - _unit(b)).square().sum(1).mean())


def uniformity(x: Tensor) -> float:
    """Measures how evenly features cover the sphere: `log mean exp(-2 d^2)` over pairs i < j of L2-normalised rows.

    Exact over all N (N - 1) / 2 pairs, block by block: memory does not grow with N squared.

    Args:
        x: (N, D) features.

    Returns:
        In [-8, 0]: 0 means that all rows point the same way (collapse; also the value for a single row), about -4 even
        coverage in many dimensions, -8 an antipodal pair.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.

    References:
        Wang & Isola 2020 (t = 2), https://arxiv.org/abs/2005.10242
    """
    z = _unit(_matrix(x))
    n = len(z)
    if not _finite(z):
        return math.nan
    if n == 1:
        return 0.0
    square = z.square().sum(1)  # (N,), 1 or, for a zero row, 0
    total = torch.zeros((), dtype=z.dtype, device=z.device)
    step = max(1, _BLOCK // n)
    for start in range(0, n - 1, step):
        rows, others = slice(start, start + step), slice(start, n)
        distance = square[rows, None] + square[others] - 2 * (z[rows] @ z[others].T)  # (step, N - start)
        total += distance.clamp_(min=0).mul_(-2).exp_().triu_(1).sum()
    return float((total / (n * (n - 1) / 2)).log())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compares two representations of the same examples: `|Y'X|^2 / (|X'X| |Y'Y|)` of the centred features.

    Rotating, scaling or shifting either side changes nothing. Use it from client to client, client to global model, and
    round to round.

    Args:
        x: (N, D1) features of one model.
        y: (N, D2) features of another model for the same examples in the same order.

    Returns:
        In [0, 1]: 1 means equal up to rotation and scale, 0 nothing in common. 0 too where either side is constant.

    Raises:
        ConfigError: x or y is not a matrix, or their row counts differ.

    References:
        Kornblith et al. 2019, https://arxiv.org/abs/1905.00414
    """
    a, b = _matrix(x), _matrix(y)
    if len(a) != len(b):
        raise ConfigError(
            f"The two representations have {len(a)} and {len(b)} rows, so examples cannot be paired; pass the features "
            "of the same examples."
        )
    if not (_finite(a) and _finite(b)):
        return math.nan
    a, b = _scaled(_centred(a)), _scaled(_centred(b))
    if len(a) < max(a.shape[1], b.shape[1]):  # N x N matrices are the smaller ones
        k, m = a @ a.T, b @ b.T
        shared, own = (k * m).sum(), k.norm() * m.norm()
    else:
        shared, own = (b.T @ a).square().sum(), (a.T @ a).norm() * (b.T @ b).norm()
    return float(shared / own) if own > 0 else 0.0


def spectrum(x: Tensor) -> NDArray[np.float64]:
    """Lists the eigenvalues of the centred covariance (divided by N - 1), largest first.

    A flat curve means that all directions are used, a cliff dimensional collapse, all zeros constant features or a
    single row.

    Args:
        x: (N, D) features.

    Returns:
        (D,), each value >= 0, or all `nan` for features that are not finite.

    Raises:
        ConfigError: x is not a matrix with at least one row and one column.

    References:
        Jing et al. 2022, https://arxiv.org/abs/2110.09348
    """
    z = _matrix(x)
    n, d = z.shape
    if not _finite(z):
        return np.full(d, np.nan)
    values = np.zeros(d)
    singular = torch.linalg.svdvals(_centred(z)).cpu().numpy()
    values[: len(singular)] = singular**2 / max(n - 1, 1)
    return values


def mutual_information_bound(loss: float, candidates: int) -> float:
    """Gives the InfoNCE lower bound on the mutual information of the two views, `log(candidates) - loss`, in nats.

    Args:
        loss: the mean contrastive loss, in nats.
        candidates: how many vectors each positive is chosen from, itself included: 1 + K for `info_nce`, 2B - 1 for
            `nt_xent`.

    Returns:
        At most `log(candidates)`, which a perfect loss of 0 reaches: few negatives cannot prove much information. 0 is
        what a collapsed encoder gets; below 0 the bound says nothing.

    Raises:
        ConfigError: fewer than one candidate.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748
    """
    if candidates < 1:
        raise ConfigError(
            f"{candidates} candidates were given, but the positive itself is one; pass 1 + the number of negatives."
        )
    return math.log(candidates) - float(loss)


def _shares(x: Tensor) -> Tensor | None:
    """Singular values over their sum, all 0 for a matrix of zeros; None for features that are not finite."""
    z = _matrix(x)
    if not _finite(z):
        return None
    # Singular values from the matrix itself: those of the Gram matrix would carry errors of 1e-8, near RankMe's 1e-7.
    s: Tensor = torch.linalg.svdvals(_scaled(z))
    return s / torch.where(s.sum() > 0, s.sum(), 1.0)


def _entropy_rank(shares: Tensor | None, eps: float) -> float:
    if shares is None:
        return math.nan
    if not shares.any():
        return 1.0
    return float(torch.special.entr(shares + eps).sum().exp())


def _matrix(x: Tensor) -> Tensor:
    """Checks the shape and widens to float64 (on the CPU where the device has no float64)."""
    if x.ndim != 2 or x.numel() == 0:
        raise ConfigError(
            f"The features have the shape {tuple(x.shape)}, but a diagnostic reads a matrix (N, D) with at least one "
            "row and one column; flatten them, and skip an empty set."
        )
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


def _finite(z: Tensor) -> bool:
    return bool(torch.isfinite(z).all())


def _centred(z: Tensor) -> Tensor:
    """Takes the column means off; equal rows give exact zeros, because the first row is taken off before."""
    z = z - z[..., :1, :]
    return z - z.mean(-2, keepdim=True)


def _scaled(z: Tensor) -> Tensor:
    """Divides by the Frobenius norm, so that fourth powers neither overflow nor vanish; zeros stay zeros."""
    peak = z.abs().max()
    z = z / torch.where(peak > 0, peak, 1.0)
    norm = z.norm()
    return z / torch.where(norm > 0, norm, 1.0)


def _small_gram(z: Tensor) -> Tensor:
    """The smaller of Z'Z and ZZ', which share their non-zero eigenvalues."""
    return z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T


def _unit(z: Tensor) -> Tensor:
    """Rows at length 1; a zero row stays zero."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / torch.where(norm > 0, norm, 1.0)
