"""How well a score tells members from others: the ROC curve, its area, and the rate at few false alarms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds
from fedssl.errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number in [0, 1] with its interval at confidence 0.95."""

    value: float
    low: float
    high: float


def curve(members: Floats, others: Floats) -> tuple[Floats, Floats]:
    """False-positive and true-positive rates (K,) of `score >= threshold` at every threshold, both ascending from 0.

    Raises:
        ConfigError: no member or no other, or scores that are not finite.
    """
    _check(members, others)
    thresholds = np.concatenate((np.unique(np.concatenate((members, others)))[::-1], [-np.inf]))
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores) for scores in (others, members)
    ]
    return np.concatenate(([0.0], rates[0])), np.concatenate(([0.0], rates[1]))


def area(members: Floats, others: Floats, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """The area under the ROC curve: how often a member scores higher than an other; 1/2 is a blind attack.

    The interval is the bootstrap's (percentiles of `draws` resamplings of both groups). It is about examples, for one
    trained model; it does not cover what another training run would give.

    Raises:
        ConfigError: see `curve`.
    """
    _check(members, others)
    both = np.concatenate((members, others))
    _, places = np.unique(both, return_inverse=True)
    inside, outside = places[: len(members)], places[len(members) :]
    rng = seeds.stream(seed, "audit", "bootstrap")
    levels = int(places.max()) + 1
    values = [_area(_share(inside, levels), _share(outside, levels))]
    for _ in range(draws):
        resampled = (group[rng.integers(0, len(group), len(group))] for group in (inside, outside))
        values.append(_area(*(_share(group, levels) for group in resampled)))
    low, high = np.quantile(values[1:], (0.025, 0.975)) if draws else (values[0], values[0])
    return Estimate(values[0], float(low), float(high))


def rate_at(members: Floats, others: Floats, false_positive_rate: float) -> Estimate:
    """The true-positive rate at the lowest threshold that raises at most this share of false alarms.

    With fewer others than one over that rate, none of them may raise an alarm. The interval is Clopper and Pearson's,
    at that threshold.

    Raises:
        ConfigError: see `curve`.
    """
    from scipy.stats import beta

    _check(members, others)
    allowed = int(false_positive_rate * len(others) + 1e-9)
    ranked = np.sort(others)[::-1]
    threshold = ranked[allowed] if allowed < len(others) else -np.inf
    n, hits = len(members), int((members > threshold).sum())
    low = float(beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return Estimate(hits / n, low, high)


def p_value(members: Floats, others: Floats) -> float:
    """Of Mann and Whitney's test, two-sided: how likely areas this far from 1/2 are if the groups do not differ.

    Raises:
        ConfigError: see `curve`.
    """
    from scipy.stats import mannwhitneyu

    _check(members, others)
    return float(mannwhitneyu(members, others, alternative="two-sided", method="asymptotic").pvalue)


def _share(places: NDArray[np.intp], levels: int) -> Floats:
    return np.asarray(np.bincount(places, minlength=levels) / len(places), np.float64)


def _area(members: Floats, others: Floats) -> float:
    """P[member > other] + P[equal] / 2, of two distributions over the same levels."""
    below = np.cumsum(others) - others
    return float((members * (below + others / 2)).sum())


def _check(members: Floats, others: Floats) -> None:
    for name, scores in (("members", members), ("others", others)):
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise ConfigError(f"the scores of {len(scores)} {name} cannot be ranked: give at least one, all finite")
