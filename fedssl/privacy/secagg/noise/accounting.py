"""What a sum with distributed discrete Gaussian noise costs in privacy."""

from __future__ import annotations

import math

from fedssl.errors import ConfigError


def rounded_norm(norm: float, dim: int) -> float:
    """The L2 norm, in steps of the grid, to which the rounding of a vector of this norm is held.

    A rounding at random exceeds it with probability exp(-1/2) at most, and is drawn again then.

    Args:
        norm: in steps, at least 0.
        dim: entries of the vector.

    References:
        Kairouz, Liu & Steinke 2021, https://arxiv.org/abs/2102.06387, theorem 1 with beta = exp(-1/2)
    """
    return math.sqrt(norm**2 + dim / 4 + norm + math.sqrt(dim) / 2)


def concentrated(norm: float, deviation: int, summands: int, dim: int) -> float:
    """The rho of zero-concentrated differential privacy of one noisy sum; infinite without noise.

    Neighbours differ in one client's vector, which is replaced by zeros: who takes part is no secret. A sum of discrete
    Gaussians is not quite one; what it lacks is tau, which is below 1e-30 for deviations of 3 steps or more.

    Args:
        norm: that a client's vector of whole numbers can have.
        deviation: of each summand of the noise, in steps.
        summands: honest clients whose noise is in the sum, the fewest there may be.
        dim: entries of the vector.

    References:
        Kairouz, Liu & Steinke 2021, https://arxiv.org/abs/2102.06387, proposition 14
    """
    if deviation < 1 or summands < 1:
        return math.inf
    tau = 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, summands))
    return (norm / (math.sqrt(summands) * deviation) + tau * math.sqrt(dim)) ** 2 / 2


def epsilon(rho: float, delta: float) -> float:
    """The epsilon, at this delta, of what is rho-concentrated; rounds add up in rho.

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


def distance_to_gaussian(deviation: float, dim: int) -> float:
    """How far discrete Gaussian noise is from a Gaussian that is rounded at random, in total variation; approximate.

    With x whole, x + round(N(0, s^2)) is post-processing of the Gaussian mechanism. Rounding at random adds the
    variance 1/6 of a triangle, so the log-ratio of the two distributions is `(z^2 / s^2 - 1) / (12 s^2)` up to order
    s^-4, their divergence 1 / (144 s^4) for each entry, and by Pinsker's inequality the distance at most
    sqrt(dim / 288) / s^2. A mechanism at this distance is (epsilon, delta + (1 + e^epsilon) distance)-private where the
    Gaussian one is (epsilon, delta)-private.

    Args:
        deviation: s of the whole sum's noise, in steps; at least about 10.
        dim: entries of the vector.
    """
    return math.sqrt(dim / 288) / deviation**2
