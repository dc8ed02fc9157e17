"""Releases of a bounded matrix with Gaussian noise: how far one record moves it, the noise, and what it has cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedssl.errors import ConfigError


def correlation_sensitivity(bound: float, examples: int) -> float:
    """How far replacing one of `examples` records moves `C = (1 / n) sum_i A_i`, in the Frobenius norm.

    `A_i` is the mean of `z z^T` over the views of record i, each with `|z|^2 <= bound`, so it is positive semi-definite
    and `|A_i|_F <= tr A_i <= bound`. For two such matrices `tr(A B) >= 0`, hence `|A - B|_F^2 <= |A|_F^2 + |B|_F^2` and

        |C - C'|_F <= sqrt(2) * bound / n,

    attained by two orthogonal embeddings. Adding or removing a record, with n public and fixed, moves C by at most
    bound / n. The number of records is taken as public: it is sent as the weight of the client.
    """
    return math.sqrt(2) * bound / examples


def symmetric_noise(dim: int, deviation: float, generator: torch.Generator) -> Tensor:
    """(D, D) the noise that a symmetric matrix needs, on the generator's device.

    The mean of a matrix of independent normal values and its transpose: deviation on the diagonal, deviation / sqrt(2)
    off it. Adding it to a symmetric C is adding the independent values and then symmetrising, which is
    post-processing: the guarantee is that of `deviation` against the sensitivity in the Frobenius norm. (Mirroring the
    upper triangle would be sound too, with more noise off the diagonal than needed.)
    """
    values = torch.randn(dim, dim, generator=generator, device=generator.device) * deviation
    return (values + values.T) / 2


def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """The epsilon, at this delta, of so many Gaussian releases of one data set; it is exact, not a bound.

    Releases with noise of `noise_multiplier` times their own sensitivity are together as private as one with the
    multiplier `s = noise_multiplier / sqrt(releases)`, whose curve is

        delta(epsilon) = Phi(1 / (2 s) - epsilon s) - e^epsilon Phi(-1 / (2 s) - epsilon s).

    It holds for the neighbours that the sensitivity is of, and no amplification by sampling is claimed.

    Args:
        noise_multiplier: at least 0; 0 gives infinity, which is no guarantee.
        releases: so far, at least 0; without one epsilon is 0.
        delta: in (0, 1).

    Raises:
        ConfigError: a number out of its range.

    References:
        Balle & Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8; composition: Dong et al. 2019,
        https://arxiv.org/abs/1905.02383, corollary 2
    """
    if not (noise_multiplier >= 0 and releases >= 0 and 0 < delta < 1):
        raise ConfigError(
            f"noise_multiplier={noise_multiplier}, releases={releases} and delta={delta} have no epsilon: "
            "give the first two at least 0 and delta in (0, 1)"
        )
    if releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    s = noise_multiplier / math.sqrt(releases)
    low, high = 0.0, 1.0
    if _delta(low, s) <= delta:
        return 0.0
    while _delta(high, s) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, s) > delta else (low, middle)
    return high


def concentrated_epsilon(rho: float, delta: float) -> float:
    """The epsilon, at this delta, of what is rho-zero-concentrated; releases of one data set add up in rho.

    A bound that holds whatever the noise is, some 3 to 10 % above the exact figure of a Gaussian of the same rho at
    delta 1e-5.

    Args:
        rho: at least 0.
        delta: in (0, 1).

    Raises:
        ConfigError: a number out of its range.

    References:
        Canonne, Kamath & Steinke 2020, https://arxiv.org/abs/2004.00010, corollary 13
    """
    if not (rho >= 0 and 0 < delta < 1):
        raise ConfigError(f"rho={rho} and delta={delta} have no epsilon: give rho at least 0 and delta in (0, 1)")
    if rho in (0, math.inf):
        return rho

    def at(order: float) -> float:
        return rho * order + math.log(1 / (order * delta)) / (order - 1) + math.log1p(-1 / order)

    low, high = 1 + 1e-9, 2 + 2 * math.sqrt(math.log(1 / delta) / rho)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9 * high:  # the bound has one minimum over the orders, and any order is a valid bound
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if at(left) < at(right) else (left, high)
    return max(0.0, at((low + high) / 2))


def _delta(epsilon: float, s: float) -> float:
    ends = torch.tensor([1 / (2 * s) - epsilon * s, -1 / (2 * s) - epsilon * s], dtype=torch.float64)
    first, second = torch.special.log_ndtr(ends).tolist()
    return math.exp(first) - math.exp(epsilon + second)
