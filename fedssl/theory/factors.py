"""Augmentation defines the invariance (T5): two factors, kept or resampled, and what is left to learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, probability, shares


class TwoFactors(NamedTuple):
    """What two views share and what the best representation z of them knows, in nats."""

    views: float  # I(v1; v2): the most that a contrastive loss can be paid for
    signal_views: float  # I(s1; s2) of the signals alone
    background_views: float  # I(b1; b2) of the backgrounds alone
    label: float  # I(z; y), z of an example that is not augmented
    background: float  # I(z; b), likewise
    label_view: float  # I(z; y), z of an augmented view
    background_view: float  # I(z; b), likewise


def two_factor_information(
    classes: int,
    backgrounds: int,
    keep_signal: float | Sequence[float],
    keep_background: float | Sequence[float],
    weights: ArrayLike | None = None,
) -> TwoFactors:
    """Gives the closed form of the thought experiment x = (s_y, b).

    The label y is uniform over C values, the signal s_y names it, the background b is uniform over B values and
    independent. Each view keeps s with the probability `keep_signal`, else draws it anew from all C values; b likewise;
    the two views and the two factors independently of one another. z is the minimal sufficient statistic of one view
    for the other: the least that reaches I(v1; v2). It contains a factor iff some client keeps it with a probability
    above 0.

    Args:
        classes: C >= 1.
        backgrounds: B >= 1.
        keep_signal: in [0, 1]; 0 is the crop that removes the signal. One number, or one for each client.
        keep_background: in [0, 1], likewise.
        weights: (M,), >= 0, the clients' shares of the examples; None weighs them alike. Both views of an example are
            made by one client, whose identity z does not see.

    Returns:
        The seven numbers. I(z; y) of the best z jumps from 0 to `log C` as `keep_signal` leaves 0, while what views
        share grows like its fourth power only: for small values a finite network, sample or budget keeps what pays
        most, the larger of `signal_views` and `background_views`.

    Raises:
        ConfigError: a count or a probability out of range, or clients whose numbers do not fit.

    References:
        Tian et al. 2020, "What makes for good views", https://arxiv.org/abs/2005.10243
    """
    c, b = at_least("classes", classes, 1), at_least("backgrounds", backgrounds, 1)
    signal, ground = _by_client(keep_signal, keep_background)
    w = shares(weights, len(signal))
    both_s, both_b = signal**2, ground**2  # the two views keep the factor together
    between_s, between_b = _channel(c, float(w @ both_s)), _channel(b, float(w @ both_b))
    kept_s, kept_b = bool(w @ both_s > 0), bool(w @ both_b > 0)
    return TwoFactors(
        views=_views(c, b, both_s, both_b, w),
        signal_views=between_s,
        background_views=between_b,
        label=math.log(c) if kept_s else 0.0,
        background=math.log(b) if kept_b else 0.0,
        label_view=_channel(c, float(w @ signal)),
        background_view=_channel(b, float(w @ ground)),
    )


def sample_two_factors(
    classes: int, backgrounds: int, keep_signal: float, keep_background: float, count: int, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws examples of the two-factor model and two views of each.

    Args:
        classes, backgrounds, keep_signal, keep_background: as in `two_factor_information`, of one client.
        count: number of examples, N >= 1.
        seed: names the random stream.

    Returns:
        The factors (N, 2), columns y and b, and the views (N, 2, 2): example, view, factor.

    Raises:
        ConfigError: a count or a probability out of range.
    """
    sizes = np.array([at_least("classes", classes, 1), at_least("backgrounds", backgrounds, 1)])
    keep = np.array([probability("keep_signal", keep_signal), probability("keep_background", keep_background)])
    n = at_least("count", count, 1)
    rng = np.random.default_rng(seed)
    factors = rng.integers(0, sizes, size=(n, 2))
    fresh = rng.integers(0, sizes, size=(n, 2, 2))
    kept = rng.random((n, 2, 2)) < keep
    return factors, np.where(kept, factors[:, None, :], fresh)


def mutual_information(joint: ArrayLike) -> float:
    """Gives the mutual information of two finite variables, by definition.

    Args:
        joint: (X, Y), >= 0; divided by its sum, so counts will do. Counts of few examples overestimate.

    Returns:
        In nats, from 0 (independent) to the smaller entropy.

    Raises:
        ConfigError: no matrix, a negative value, or no mass.
    """
    p = np.asarray(joint, dtype=np.float64)
    if p.ndim != 2 or not np.all(p >= 0) or not 0 < float(p.sum()) < math.inf:
        raise ConfigError(
            f"The joint has the shape {p.shape} and the sum {p.sum()}; pass a matrix of values >= 0, not all 0."
        )
    p = p / p.sum()
    x, y = np.nonzero(p)
    return max(0.0, float(p[x, y] @ np.log(p[x, y] / (p.sum(1)[x] * p.sum(0)[y]))))


def _views(c: int, b: int, both_s: Array, both_b: Array, w: Array) -> float:
    """I(v1; v2): given v1 there are four kinds of v2, by whether the signal and the background are equal."""
    total = 0.0
    for equal_s in (True, False):
        for equal_b in (True, False):
            count = (1 if equal_s else c - 1) * (1 if equal_b else b - 1)
            chance = float(w @ (_chance(c, both_s, equal_s) * _chance(b, both_b, equal_b)))  # of one such v2
            if count and chance > 0:
                total += count * chance * math.log(chance * c * b)
    return max(0.0, total)


def _chance(size: int, keep: Array, equal: bool) -> Array:
    """P(one given value) of a factor that is kept with `keep` or else uniform."""
    return (keep if equal else 0.0) + (1 - keep) / size


def _channel(size: int, keep: float) -> float:
    """Mutual information of a uniform factor and its copy, kept with `keep` or else drawn anew."""
    ones = np.ones(1)
    return _views(size, 1, keep * ones, ones, ones)


def _by_client(keep_signal: float | Sequence[float], keep_background: float | Sequence[float]) -> tuple[Array, Array]:
    signal, ground = np.atleast_1d(keep_signal).astype(np.float64), np.atleast_1d(keep_background).astype(np.float64)
    if signal.ndim != 1 or ground.ndim != 1 or (len(signal) != len(ground) and 1 not in (len(signal), len(ground))):
        raise ConfigError(
            f"keep_signal has the shape {signal.shape} and keep_background {ground.shape}; pass one number each, or "
            "one for each client."
        )
    for name, values in (("keep_signal", signal), ("keep_background", ground)):
        for value in values.tolist():
            probability(name, value)
    signal, ground = np.broadcast_arrays(signal, ground)
    return signal, ground
