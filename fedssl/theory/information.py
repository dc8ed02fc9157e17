"""Mutual information of correlated Gaussians and what InfoNCE's bound misses of it (T4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, not_negative

_BLOCK = 1 << 21  # numbers held at once by the Monte Carlo: 16 MiB of float64


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error."""

    value: float
    error: float


def gaussian_mutual_information(correlation: float, dims: int = 1) -> float:
    """Gives the mutual information of two Gaussian vectors whose coordinates are correlated one to one.

    Args:
        correlation: rho of x_i and y_i, in (-1, 1).
        dims: number of independent coordinate pairs, >= 1.

    Returns:
        `-dims / 2 * log(1 - rho^2)` in nats: 0 for independence, without bound as |rho| goes to 1.

    Raises:
        ConfigError: a correlation or number of dimensions out of range.
    """
    _check_correlation(correlation)
    return -0.5 * at_least("dims", dims, 1) * math.log1p(-(correlation**2))


def gaussian_correlation(information: float, dims: int = 1) -> float:
    """Gives the correlation >= 0 that carries this mutual information: the inverse of `gaussian_mutual_information`.

    Args:
        information: in nats, >= 0.
        dims: number of independent coordinate pairs, >= 1.

    Raises:
        ConfigError: a negative information or no dimensions.
    """
    nats = not_negative("The information", information)
    return math.sqrt(-math.expm1(-2 * nats / at_least("dims", dims, 1)))


def info_nce_bias(correlation: float, dims: int, candidates: int, *, trials: int = 4000, seed: int = 0) -> Estimate:
    """Estimates what the best critic's bound misses: `I - (log N - E[L])` for correlated Gaussians.

    With the ratio r(x, y) = p(y|x) / p(y) as critic the bias is `E[log((r_0 + sum_j r_j) / N)]`, the positive's r_0
    beside N - 1 negatives. It is averaged over `trials` draws; the mean of the negatives' ratios, known to be 1, serves
    as control variate with the coefficient of least variance.

    Args:
        correlation: rho, in (-1, 1).
        dims: number of coordinate pairs, >= 1.
        candidates: N >= 1, the positive included.
        trials: >= 2.
        seed: names the random stream.

    Returns:
        The bias in nats and its standard error. It is I for N = 1, at least `I - log N`, and 0 in the limit; see
        `asymptotic_bias` for where the fall like 1/N begins.

    Raises:
        ConfigError: a number out of range.
    """
    _check_correlation(correlation)
    n, d, t = at_least("candidates", candidates, 1), at_least("dims", dims, 1), at_least("trials", trials, 2)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // (n * d))
    parts = [_draw(correlation, d, n, min(block, t - start), rng) for start in range(0, t, block)]
    value, control = np.concatenate([v for v, _ in parts]), np.concatenate([c for _, c in parts])
    spread = control - control.mean()
    variance = float(spread @ spread)
    slope = float(spread @ value) / variance if variance > 0 else 0.0
    rest = value - slope * control  # the control has the mean 0
    return Estimate(float(rest.mean()), float(rest.std(ddof=1) / math.sqrt(t)))


def info_nce_bound(correlation: float, dims: int, candidates: int, *, trials: int = 4000, seed: int = 0) -> Estimate:
    """Estimates the InfoNCE bound `log N - E[L]` that the best critic reaches for correlated Gaussians.

    Args:
        correlation, dims, candidates, trials, seed: as in `info_nce_bias`.

    Returns:
        The bound in nats, at most the mutual information and at most `log N`, and its standard error.

    Raises:
        ConfigError: a number out of range.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, section 2.3; Poole et al. 2019,
        https://arxiv.org/abs/1905.06922
    """
    bias = info_nce_bias(correlation, dims, candidates, trials=trials, seed=seed)
    return Estimate(gaussian_mutual_information(correlation, dims) - bias.value, bias.error)


def asymptotic_bias(information: float, candidates: int) -> float:
    """Gives the leading term of the bias for correlated Gaussians, `(exp(2 I) - 1) / (2 N)`.

    Expanding `E[log(mean of N ratios)]` leaves half the variance of one ratio over N, and for these Gaussians that
    variance is `(1 - rho^2)^-dims - 1 = exp(2 I) - 1`. The law 1/N therefore begins only at N well above `exp(2 I)`:
    with fewer candidates the bias falls more slowly, and below `exp(I)` it is at least `I - log N`.

    Args:
        information: I in nats, >= 0.
        candidates: N >= 1.

    Raises:
        ConfigError: a number out of range.
    """
    nats = not_negative("The information", information)
    return math.expm1(2 * nats) / (2 * at_least("candidates", candidates, 1))


def log_log_slope(x: ArrayLike, y: ArrayLike) -> float:
    """Fits the exponent a of a power law `y = c x^a` by least squares on logarithms.

    Args:
        x: (P,), all > 0, at least two different values; N of a bias curve.
        y: (P,), all > 0; the biases.

    Returns:
        The slope: -1 for a bias that falls like 1/N.

    Raises:
        ConfigError: values that are not above 0, lengths that differ, or fewer than two different x.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not np.all(a > 0) or not np.all(b > 0) or len(np.unique(a)) < 2:
        raise ConfigError(
            f"x is {a.tolist()} and y is {b.tolist()}, but a power law is fitted to logarithms; pass two or more "
            "points, all values above 0."
        )
    u, v = np.log(a) - np.log(a).mean(), np.log(b)
    return float((u @ v) / (u @ u))


def _draw(rho: float, dims: int, n: int, trials: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """`log mean_j r_j` with the positive among N, and the negatives' share of it; (trials,) each."""
    x = rng.standard_normal((trials, 1, dims))
    y = rng.standard_normal((trials, n, dims))
    y[:, :1] = rho * x + math.sqrt(1 - rho**2) * y[:, :1]
    log_ratio = (-((y - rho * x) ** 2) / (2 * (1 - rho**2)) + y**2 / 2 - math.log1p(-(rho**2)) / 2).sum(
        2
    )  # (trials, N)
    mean = np.logaddexp.reduce(log_ratio, axis=1) - math.log(n)
    with np.errstate(over="ignore"):
        control = np.minimum(np.expm1(log_ratio[:, 1:]), 1e150).sum(1) / n  # its square must stay finite
    return mean, control


def _check_correlation(correlation: float) -> None:
    if not -1 < correlation < 1:
        raise ConfigError(
            f"The correlation is {correlation}, for which the mutual information is not finite; pass a number between "
            "-1 and 1."
        )
