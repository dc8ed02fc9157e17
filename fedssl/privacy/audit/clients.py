"""Client canaries: epsilon of client-level privacy, estimated in one run from updates in random directions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds
from fedssl.errors import ConfigError

Floats = NDArray[np.float64]


def directions(count: int, dim: int, seed: int) -> Floats:
    """(count, dim) random unit vectors, each the update of a canary client, to be scaled to the clipping norm."""
    drawn = seeds.stream(seed, "audit", "canaries").standard_normal((count, dim))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float64)


def client_canary_estimate(released: Floats, canaries: Floats, *, delta: float) -> float:
    """An ESTIMATE of the epsilon of a federated mechanism, not a bound, from canary clients that all took part.

    The cosine of a released sum with a random direction that nobody has sent is N(0, 1/d) in high dimension; with those
    that canaries sent it is N(mu, s^2), whose mean and deviation are read off. The result is the epsilon at delta
    between these two distributions.

    Args:
        released: (d,) the sum of all noised aggregates, such as final model minus initial model.
        canaries: (k, d) unit vectors, k at least 2.
        delta: in (0, 1).

    Raises:
        ConfigError: shapes that do not fit, or delta out of range.

    References:
        Andrew et al. 2023, https://arxiv.org/abs/2302.03098, algorithm 1
    """
    if canaries.ndim != 2 or len(canaries) < 2 or released.shape != canaries.shape[1:]:
        raise ConfigError(
            f"a release of shape {released.shape} and canaries of shape {canaries.shape} do not fit: give (d,) and "
            "(k, d), k at least 2"
        )
    return estimate_of(scaled_cosines(released, canaries), delta=delta)


def scaled_cosines(released: Floats, canaries: Floats) -> Floats:
    """(k,) the cosines with each canary times sqrt(d): standard normal where nothing was sent."""
    length = max(float(np.linalg.norm(released)), 1e-300)
    return np.asarray(canaries @ released * (math.sqrt(released.size) / length), np.float64)


def estimate_of(cosines: Floats, *, delta: float) -> float:
    """The epsilon between a standard normal distribution and the one of such cosines; see `client_canary_estimate`."""
    return normal_epsilon((0.0, 1.0), (float(cosines.mean()), float(cosines.std(ddof=1))), delta)


def normal_epsilon(first: tuple[float, float], second: tuple[float, float], delta: float) -> float:
    """The least epsilon at which two normal distributions are (epsilon, delta)-close, both ways.

    Args:
        first, second: mean and standard deviation, the latter above 0.
        delta: in (0, 1).

    Raises:
        ConfigError: a deviation that is not positive, or delta out of range.
    """
    if not (first[1] > 0 and second[1] > 0 and 0 < delta < 1):
        raise ConfigError(
            f"normal distributions {first} and {second} at delta={delta} have no epsilon: give positive deviations "
            "and delta in (0, 1)"
        )

    def far(epsilon: float) -> bool:
        return max(_hockey_stick(first, second, epsilon), _hockey_stick(second, first, epsilon)) > delta

    if not far(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while far(high):
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if far(middle) else (low, middle)
    return high


def _hockey_stick(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    """P(A) - e^epsilon Q(A), where A is the set on which p's density is above e^epsilon times q's."""
    (m, s), (n, t) = p, q
    # ln p - ln q - epsilon = a x^2 + b x + c, positive on A
    a = 1 / (2 * t**2) - 1 / (2 * s**2)
    b = m / s**2 - n / t**2
    c = n**2 / (2 * t**2) - m**2 / (2 * s**2) + math.log(t / s) - epsilon
    if abs(a) < 1e-12:
        if b == 0:
            return max(0.0, 1 - math.exp(epsilon)) if c > 0 else 0.0
        intervals = [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    else:
        root = b**2 - 4 * a * c
        if root <= 0:
            intervals = [(-math.inf, math.inf)] if a > 0 else []
        else:
            low, high = sorted(((-b - math.sqrt(root)) / (2 * a), (-b + math.sqrt(root)) / (2 * a)))
            intervals = [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]
    return sum(_mass(m, s, *each) - math.exp(min(epsilon + _log_mass(n, t, *each), 700)) for each in intervals)


def _mass(mean: float, std: float, low: float, high: float) -> float:
    return math.exp(_log_mass(mean, std, low, high))


def _log_mass(mean: float, std: float, low: float, high: float) -> float:
    """ln P[low < N(mean, std^2) < high], accurate in the tails."""
    from scipy.special import log_ndtr

    a, b = (low - mean) / std, (high - mean) / std
    if a > 0:  # the same by symmetry, where nothing cancels
        a, b = -b, -a
    upper, lower = float(log_ndtr(b)), float(log_ndtr(a))
    return upper + math.log1p(-math.exp(lower - upper)) if lower < upper else -math.inf
