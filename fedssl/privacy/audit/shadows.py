"""Likelihood-ratio membership inference from few shadow runs: one statistic per example and run, and who was in.

The examples of a shadow run are drawn by a fair coin each; the statistic of an example is compared with what it was in
the shadow runs that did, or did not, train on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]


def likelihood_ratio(target: Floats, shadows: Floats, included: Coins) -> Floats:
    """(n,) the log-likelihood ratio of "in" over "out" of each example's statistic in the run under attack.

    Two normal distributions an example: its own two means, and deviations pooled over all examples, as the authors
    advise below 64 shadows. An example that was never in (or never out) takes the common difference from its other
    mean.

    Args:
        target: (n,) of the run under attack.
        shadows: (k, n) of the shadow runs, k at least 2.
        included: (k, n) whether the shadow run trained on the example.

    Raises:
        ConfigError: shapes that do not fit, or no example that was both in and out.

    References:
        Carlini et al. 2022, https://arxiv.org/abs/2112.03570, algorithm 1 and section VI.D
    """
    _check(target, shadows, included)
    means, counts = zip(*(_means(shadows, chosen) for chosen in (included, ~included)), strict=True)
    both = (counts[0] > 0) & (counts[1] > 0)
    if not both.any():
        raise ConfigError(f"no example was in one of {len(shadows)} shadow runs and out of another: use more of them")
    shift = float((means[0] - means[1])[both].mean())
    inside = np.where(counts[0] > 0, means[0], means[1] + shift)
    outside = np.where(counts[1] > 0, means[1], means[0] - shift)
    deviations = [_pooled(shadows, chosen, mean) for chosen, mean in ((included, inside), (~included, outside))]
    return _log_density(target, inside, deviations[0]) - _log_density(target, outside, deviations[1])


def excess(target: Floats, shadows: Floats, excluded: Coins) -> Floats:
    """(n,) how far each example's statistic is above what it was in runs that did not train on it, in deviations.

    The attack on a run whose members cannot be drawn again. For the non-members of that run, leave out shadow runs at
    random as for its members, or the scores of the two groups have errors of unequal size.

    Args:
        target: (n,) of the run under attack.
        shadows: (k, n) of the shadow runs.
        excluded: (k, n) which of them to compare with, all without the example; each example at least once, or its
            score is 0.

    References:
        Carlini et al. 2022, section VI.C (the offline attack)
    """
    _check(target, shadows, excluded)
    mean, count = _means(shadows, excluded)
    # The mean of few runs is uncertain, and of fewer runs more so.
    spread = _pooled(shadows, excluded, mean) * np.sqrt(1 + 1 / np.maximum(count, 1))
    return np.where(count > 0, (target - mean) / spread, 0.0)


def _means(values: Floats, chosen: Coins) -> tuple[Floats, NDArray[np.int64]]:
    count = chosen.sum(0)
    return np.where(chosen, values, 0.0).sum(0) / np.maximum(count, 1), count


def _pooled(values: Floats, chosen: Coins, mean: Floats) -> float:
    """The deviation within examples; the tiny floor stands for numbers that never differ."""
    free = np.maximum(chosen.sum(0) - 1, 0).sum()
    squares = float((np.where(chosen, values - mean, 0.0) ** 2).sum())
    return float(np.sqrt(squares / max(1, int(free)))) + 1e-12


def _log_density(x: Floats, mean: Floats, deviation: float) -> Floats:
    return np.asarray(-np.log(deviation) - (x - mean) ** 2 / (2 * deviation**2))


def _check(target: Floats, shadows: Floats, chosen: Coins) -> None:
    if shadows.ndim != 2 or len(shadows) < 2 or shadows.shape != chosen.shape or target.shape != shadows.shape[1:]:
        raise ConfigError(
            f"statistics of shape {target.shape} and {shadows.shape} with coins {chosen.shape} do not fit: give (n,), "
            "(k, n) and (k, n), k at least 2"
        )
