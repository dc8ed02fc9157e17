"""Whole numbers with the discrete Gaussian distribution, drawn exactly: by comparing integers, without a logarithm."""

from __future__ import annotations

import numpy as np

from fedssl.errors import ConfigError
from fedssl.privacy.secagg.chacha import Stream

LARGEST = 1 << 24  # a squared deviation and what it is compared with stay whole numbers below 2**63


def draw(deviation: int, count: int, stream: Stream) -> np.ndarray:
    """(count,) int64 with P(z) proportional to exp(-z**2 / (2 * deviation**2)).

    Rejection from the discrete Laplace distribution of the same scale. With a whole deviation s the chance to accept z
    is exp(-(|z| - s)**2 / (2 * s**2)), a ratio of integers, so every draw is exact. That matters: samplers in floating
    point leak through their last bits (Mironov 2012, https://doi.org/10.1145/2382196.2382264).

    Args:
        deviation: s, from 1 to 2**24.
        count: at least 0.
        stream: of random words; who knows it knows the noise.

    Raises:
        ConfigError: the deviation is out of its range.

    References:
        Canonne, Kamath & Steinke 2020, https://arxiv.org/abs/2004.00010, algorithms 1 to 3
    """
    if not 1 <= deviation <= LARGEST:
        raise ConfigError(f"a discrete Gaussian of deviation {deviation} is refused: give a whole number up to 2**24")
    out = np.empty(count, np.int64)
    todo = np.arange(count)
    while todo.size:
        drawn = _laplace(deviation, todo.size, stream)
        away = np.abs(drawn) - deviation
        kept = _bernoulli_exp(away * away, 2 * deviation * deviation, stream)
        out[todo[kept]] = drawn[kept]
        todo = todo[~kept]
    return out


def _laplace(scale: int, count: int, stream: Stream) -> np.ndarray:
    """(count,) int64 with P(z) proportional to exp(-|z| / scale)."""
    out = np.empty(count, np.int64)
    todo = np.arange(count)
    while todo.size:
        rest = stream.below(scale, todo.size)
        kept = _bernoulli_exp(rest, scale, stream)
        whole = np.zeros(todo.size, np.int64)
        more = np.flatnonzero(kept)
        while more.size:  # a geometric number: heads of probability 1 / e in a row
            more = more[_bernoulli_exp(np.ones(more.size, np.int64), 1, stream)]
            whole[more] += 1
        size = rest + scale * whole
        negative = stream.below(2, todo.size) == 1
        kept &= ~(negative & (size == 0))  # or zero would be drawn twice as often
        out[todo[kept]] = np.where(negative, -size, size)[kept]
        todo = todo[~kept]
    return out


def _bernoulli_exp(numerator: np.ndarray, denominator: int, stream: Stream) -> np.ndarray:
    """(n,) bool: true with probability exp(-numerator / denominator), for whole numbers of at least 0."""
    whole, rest = np.divmod(numerator, denominator)
    alive = _bernoulli_exp_proper(rest, denominator, stream)
    left = np.flatnonzero(alive & (whole > 0))
    while left.size:
        passed = _bernoulli_exp_proper(np.full(left.size, denominator), denominator, stream)
        alive[left[~passed]] = False
        whole[left] -= 1
        left = left[passed & (whole[left] > 0)]
    return alive


def _bernoulli_exp_proper(numerator: np.ndarray, denominator: int, stream: Stream) -> np.ndarray:
    """As `_bernoulli_exp`, for ratios up to 1: the length of a run of shrinking chances ratio / k is even."""
    even = np.ones(numerator.size, bool)
    running = np.arange(numerator.size)
    k = 1
    while running.size:
        heads = stream.below(denominator, running.size) < numerator[running]
        heads &= stream.below(k, running.size) == 0  # the ratio and 1 / k apart, so that nothing overflows
        running = running[heads]
        even[running] = ~even[running]
        k += 1
    return even
