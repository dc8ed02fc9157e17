"""What the temperature does to a softmax over Gaussian scores (T7).

The model of every function but `negative_weights`: the positive's score is N(mu_p, sigma_p^2), the K negatives' scores
are N(mu_n, sigma_n^2), all independent. Then p, the softmax probability of the positive, and the gradient
(p - 1) / t of the loss with respect to the positive's score are random numbers whose moments are given exactly: by
`1 / (1 + S) = int e^-u e^(-u S) du` the log-sum-exp over negatives becomes the K-th power of one Gaussian mean, and two
one-dimensional integrals remain. There is no approximation of the log-sum-exp, at any temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, not_negative, positive

_STEP = 0.25  # of the trapezoidal rule; its error falls like exp(-9.8 / step), the strip being pi / 2 wide
_TAIL = 8.5  # standard deviations beyond which a Gaussian is cut off: 2e-17
_WIDEST = 500.0  # standard deviations over the temperature; beyond, sums get long and p is 0 or 1


class Moments(NamedTuple):
    """Of the positive's softmax probability p."""

    missing: float  # E[1 - p]
    variance: float  # Var[p]


def negative_weights(scores: ArrayLike, temperature: float) -> Array:
    """Gives each negative's share of the gradient: the softmax of the negatives' scores over the temperature.

    Args:
        scores: (..., K), K >= 1, finite.
        temperature: > 0.

    Returns:
        (..., K), rows sum to 1. As t -> 0 all weight goes to the hardest negative (the highest score, ties in equal
        parts), as t -> inf each gets 1 / K.

    Raises:
        ConfigError: no negatives, scores that are not finite, or a temperature that is not above 0.

    References:
        Wang & Liu 2021, https://arxiv.org/abs/2012.09740
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim == 0 or s.size == 0 or not np.all(np.isfinite(s)):
        raise ConfigError(f"The scores have the shape {s.shape}; pass at least one finite score for each anchor.")
    e = np.exp((s - s.max(-1, keepdims=True)) / positive("The temperature", temperature))
    return np.asarray(e / e.sum(-1, keepdims=True), dtype=np.float64)


def probability_moments(
    temperature: float,
    positive_mean: float,
    positive_std: float,
    negative_mean: float,
    negative_std: float,
    negatives: int,
) -> Moments:
    """Gives the mean and variance of the positive's softmax probability over Gaussian scores, by quadrature.

    Args:
        temperature: t > 0; no standard deviation may be above 500 t.
        positive_mean, positive_std: of the positive's score; std >= 0.
        negative_mean, negative_std: of each negative's score; std >= 0.
        negatives: K >= 1.

    Returns:
        `E[1 - p]`, with a relative error near 1e-10, and `Var[p]`, with an absolute error near 1e-12 times E[1 - p].

    Raises:
        ConfigError: a number out of range.
    """
    t = positive("The temperature", temperature)
    a = not_negative("positive_std", positive_std) / t
    b = not_negative("negative_std", negative_std) / t
    k = at_least("negatives", negatives, 1)
    gap = (negative_mean - positive_mean) / t
    if not math.isfinite(gap):
        raise ConfigError(f"The mean scores are {positive_mean} and {negative_mean}; pass finite numbers.")
    if max(a, b) > _WIDEST:
        raise ConfigError(
            f"A standard deviation is {max(a, b):.0f} times the temperature {t}, too much for the quadrature; take a "
            f"temperature of at least {max(a, b) * t / _WIDEST:g}."
        )
    if a == b == 0:
        return Moments(_sigmoid(gap + math.log(k)), 0.0)
    # w is log u minus the positive's fluctuation; E[f(p)] = int E_p[h(w + a Z)] (1 - E_n[e^-e^(w + gap + b Z)]^K) dw.
    low, high = -40.0 - _TAIL * a, 5.0 + _TAIL * a
    w: Array = _STEP * np.arange(math.floor(low / _STEP), math.ceil(high / _STEP) + 1, dtype=np.float64)
    hit = _gaussian_mean(lambda v: -np.expm1(-np.exp(v)), w + gap, b)  # 1 - psi
    any_hit = -np.expm1(k * np.log1p(-np.minimum(hit, 1 - 1e-16)))  # 1 - psi^K, exact where psi is near 1
    first = _gaussian_mean(lambda v: np.exp(v - np.exp(v)), w, a) * any_hit  # of E[1 - p]
    second = _gaussian_mean(lambda v: np.exp(2 * v - np.exp(v)), w, a) * any_hit  # of E[1 - p^2]
    missing, unsquared = _STEP * float(first.sum()), _STEP * float(second.sum())
    return Moments(missing, max(0.0, 2 * missing - unsquared - missing**2))


def positive_probability(
    temperature: float,
    positive_mean: float,
    positive_std: float,
    negative_mean: float,
    negative_std: float,
    negatives: int,
) -> float:
    """Gives E[p], the mean softmax probability of the positive over Gaussian scores.

    Args:
        temperature, positive_mean, positive_std, negative_mean, negative_std, negatives: as `probability_moments`.

    Returns:
        In [0, 1]: 1 / (1 + K) as t -> inf; as t -> 0 the chance that the positive has the highest score.

    Raises:
        ConfigError: a number out of range.
    """
    found = probability_moments(temperature, positive_mean, positive_std, negative_mean, negative_std, negatives)
    return min(1.0, max(0.0, 1 - found.missing))


def gradient_snr(
    temperature: float,
    positive_mean: float,
    positive_std: float,
    negative_mean: float,
    negative_std: float,
    negatives: int,
    noise_floor: float,
) -> float:
    """Gives the signal-to-noise ratio of the gradient g = (p - 1) / t: `|E[g]| / sqrt(Var[g] + noise_floor^2)`.

    Without a floor the factor 1 / t cancels and the ratio `E[1 - p] / std[p]` has no maximum: as t -> inf, p comes to
    stand still and the ratio grows like t (1 + K) / sqrt(sigma_p^2 + sigma_n^2 / K). A floor, noise of the gradient
    that does not shrink with it (rounding, other terms of the loss), makes the ratio fall like 1 / t for large t and
    gives an interior maximum.

    Args:
        temperature, positive_mean, positive_std, negative_mean, negative_std, negatives: as `probability_moments`.
        noise_floor: >= 0, the standard deviation of that noise, in units of the gradient: 1 / score.

    Returns:
        >= 0; `inf` when neither the scores nor the floor vary.

    Raises:
        ConfigError: a number out of range.
    """
    floor = not_negative("noise_floor", noise_floor)
    found = probability_moments(temperature, positive_mean, positive_std, negative_mean, negative_std, negatives)
    signal, noise = found.missing / temperature, math.hypot(math.sqrt(found.variance) / temperature, floor)
    if noise == 0:
        return math.inf if signal > 0 else 0.0
    return signal / noise


def _gaussian_mean(f: Callable[[Array], Array], w: Array, std: float) -> Array:
    """`E[f(w + std Z)]` on the grid w of step `_STEP`, by the trapezoidal rule."""

    def bounded(v: Array) -> Array:
        return f(np.minimum(v, 300.0))  # every f here is constant to rounding beyond 4

    if std == 0:
        return bounded(w)
    if std < 1:  # nodes of Z; both the Gaussian and f are smooth on this scale
        z = np.arange(-_TAIL, _TAIL + 0.25, 0.25)
        weight = np.exp(-z * z / 2)
        found: Array = bounded(w[:, None] + std * z) @ (weight / weight.sum())
        return found
    reach = math.ceil(_TAIL * std / _STEP)  # nodes on the grid itself: a convolution
    weight = np.exp(-((np.arange(-reach, reach + 1) * _STEP / std) ** 2) / 2)
    wide = w[0] + np.arange(-reach, len(w) + reach) * _STEP
    return np.convolve(bounded(wide), weight / weight.sum(), mode="valid")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
