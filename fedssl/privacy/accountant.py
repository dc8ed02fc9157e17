"""Epsilon of Gaussian releases on Poisson samples, by three accountants, and the noise that an epsilon asks for.

The convention, everywhere in this package: a noise multiplier is the standard deviation of the noise over the L2
sensitivity of what is released *under the declared relation of neighbours*. Accountants never see a clip norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import lru_cache
from typing import TYPE_CHECKING

from fedssl.errors import ConfigError
from fedssl.privacy.release import concentrated_epsilon, gaussian_epsilon

if TYPE_CHECKING:
    from dp_accounting import DpEvent
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

FINE, FAST = 1e-4, 2e-3  # grids of privacy losses


class Accountant(StrEnum):
    """How losses of many releases are added up."""

    pld = auto()  # privacy loss distributions, pessimistic to 1e-4 (dp-accounting): the figure that is claimed
    prv = auto()  # the same by Fourier transform (opacus): upper end of its error, about 0.01 above
    rdp = auto()  # Renyi divergences (opacus): valid and looser


class Relation(StrEnum):
    """Which two data sets are neighbours."""

    add_remove = auto()  # one has one unit more: the clipped sum moves by the clip norm
    replace_one = auto()  # one unit is another one: it moves by twice the clip norm


@dataclass(frozen=True)
class Release:
    """`count` times a sum with Gaussian noise over a Poisson sample.

    Attributes:
        noise_multiplier: standard deviation of the noise over the sum's sensitivity, at least 0; 0 is no guarantee.
        sample_rate: probability with which each unit takes part, in (0, 1]; 1 means that nothing is sampled.
        count: how often, at least 0.
        concentrated: of the noise no more is known than that it is as concentrated as that Gaussian, which a sum of
            discrete Gaussians is. Not with sampling.
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1
    concentrated: bool = False

    def __post_init__(self) -> None:
        if not (self.noise_multiplier >= 0 and 0 < self.sample_rate <= 1 and self.count >= 0):
            raise ConfigError(
                f"noise_multiplier={self.noise_multiplier}, sample_rate={self.sample_rate} and count={self.count} are "
                "no release: give at least 0, a rate in (0, 1] and at least 0"
            )
        if self.concentrated and self.sample_rate < 1:
            raise ConfigError(
                f"sample_rate={self.sample_rate} with noise that is only known to be concentrated has no accountant "
                "here: claim no sampling"
            )


def joint(*noise_multipliers: float) -> float:
    """The multiplier of several Gaussian releases of *one* sample, taken as one: (sum of s^-2)^(-1/2).

    Releases that share their sample, such as a batch's statistics and its gradient, are one Gaussian inside one
    subsampling; accounting for them as two sampled releases claims too little.
    """
    if min(noise_multipliers) == 0:
        return 0.0
    return float(sum(s**-2 for s in noise_multipliers) ** -0.5)


def epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_remove",
) -> float:
    """Epsilon, at this delta, of `steps` equal releases.

    Args:
        noise_multiplier: standard deviation of the noise over the sum's sensitivity; 0 gives infinity.
        sample_rate: of the Poisson sample of each step, in (0, 1]; 1: every step sees everything.
        steps: at least 0; without one epsilon is 0.
        delta: in (0, 1).
        accountant: pld, prv or rdp. `gdp` is refused: its limit theorem claims too little.
        relation: add_remove; or replace_one, for releases that are not sampled. Under it this function still takes
            the multiplier of *adding* a unit, whose sensitivity is half: it is the noise over the clip norm.

    Raises:
        ConfigError: a number out of its range, an unknown accountant or relation, or replace-one with sampling.

    Examples:
        >>> round(epsilon(1.0, 0.01, 1000, 1e-5), 2)
        1.83
    """
    if relation not in list(Relation):
        raise ConfigError(f"relation={relation!r} is unknown: use {' or '.join(Relation)}")
    if relation == Relation.replace_one:
        if sample_rate < 1:
            raise ConfigError(
                f"sample_rate={sample_rate} with relation=replace_one has no accountant here: use relation=add_remove"
            )
        noise_multiplier /= 2
    return compose([Release(noise_multiplier, sample_rate, steps)], delta, accountant)


def compose(releases: Iterable[Release], delta: float, accountant: str = "pld", grid: float = FINE) -> float:
    """Epsilon, at this delta, of different releases of the same data; see `epsilon`.

    Args:
        releases: in any order; equal ones are added up.
        delta, accountant: see `epsilon`.
        grid: of privacy losses, for pld, which rounds up to it: `FINE`, or `FAST`, which says a little too much.
    """
    if accountant not in list(Accountant):
        known = f"accountant={accountant!r} is no guarantee here: use {', '.join(Accountant)}"
        raise ConfigError(f"{known}{'; gdp claims too little' if accountant == 'gdp' else ''}")
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta} is no probability of failure: give a number in (0, 1), far below 1 / units")
    counts: dict[tuple[float, float, bool], int] = {}
    for release in releases:
        key = (release.noise_multiplier, release.sample_rate, release.concentrated)
        counts[key] = counts.get(key, 0) + release.count
    found = [Release(noise, rate, count, only) for (noise, rate, only), count in sorted(counts.items()) if count]
    if not found:
        return 0.0
    if found[0].noise_multiplier == 0:
        return math.inf
    if all(r.sample_rate == 1 for r in found):  # one Gaussian, whatever the accountant: a formula, not a bound
        precision = sum(r.count / r.noise_multiplier**2 for r in found)
        if any(r.concentrated for r in found):
            return concentrated_epsilon(precision / 2, delta)
        return gaussian_epsilon(precision**-0.5, 1, delta)
    if any(r.concentrated for r in found):
        raise ConfigError("noise that is only known to be concentrated does not add up with sampled releases here")
    if accountant == Accountant.pld:
        return _pld(found, delta, grid)
    from opacus.accountants import PRVAccountant, RDPAccountant  # here, because it takes seconds to import

    other = PRVAccountant() if accountant == Accountant.prv else RDPAccountant()
    other.history = [(r.noise_multiplier, r.sample_rate, r.count) for r in found]
    with warnings.catch_warnings():  # both warn of ranges that only make their answer larger
        warnings.simplefilter("ignore")
        return float(other.get_epsilon(delta))


def curve(release: Release, deltas: Sequence[float]) -> list[float]:
    """Epsilon at each of these deltas, on the fast grid."""
    if release.count == 0 or release.noise_multiplier == 0 or release.sample_rate == 1:
        return [compose([release], delta) for delta in deltas]
    composed = _composed((release,), FAST)
    return [float(composed.get_epsilon(delta)) for delta in deltas]


def _pld(releases: Iterable[Release], delta: float, grid: float) -> float:
    """By privacy loss distributions rounded up to a grid: a coarser one is faster, and says a little too much."""
    return float(_composed(tuple(releases), grid).get_epsilon(delta))


@lru_cache(maxsize=64)
def _composed(releases: tuple[Release, ...], grid: float) -> PLDAccountant:
    import dp_accounting  # here, because it takes a second to import
    from dp_accounting import pld

    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    for release in releases:
        accountant.compose(_event(release), release.count)
    return accountant


def _event(release: Release) -> DpEvent:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
    return gaussian if release.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(release.sample_rate, gaussian)


@lru_cache(maxsize=256)
def noise_multiplier(
    target_epsilon: float, sample_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> float:
    """The least noise, to about 0.1 %, with which `steps` releases cost at most `target_epsilon`.

    Args:
        target_epsilon: above 0.
        sample_rate, steps, delta, accountant: see `epsilon`; at least one step.

    Returns:
        A multiplier whose epsilon is at most the target.

    Raises:
        ConfigError: a number out of its range, or no noise up to 10^5 suffices.
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)) or steps < 1:
        raise ConfigError(
            f"target_epsilon={target_epsilon} for {steps} steps asks for no noise in particular: give a positive "
            "epsilon and at least one step"
        )

    from scipy.optimize import brentq

    def excess(log_noise: float, accountant: str) -> float:
        """How far above the target, in logarithms."""
        noise = math.exp(log_noise)
        if accountant == Accountant.pld and sample_rate < 1:
            return math.log(_pld([Release(noise, sample_rate, steps)], delta, FAST) / target_epsilon)
        return math.log(epsilon(noise, sample_rate, steps, delta, accountant) / target_epsilon)

    high = 0.0
    while excess(high, "rdp") > 0:  # quick, and never below the others
        high += 0.2
        if high > math.log(1e5):
            raise ConfigError(f"no noise brings {steps} steps to epsilon {target_epsilon} at delta {delta}: give more")
    low = high - 0.2  # small steps: the less noise, the larger the accountants' grids
    while excess(low, accountant) < 0 and low > math.log(0.02):
        low, high = low - 0.2, low
    if excess(low, accountant) <= 0:
        return math.exp(low)
    root = float(brentq(excess, low, high, args=(accountant,), xtol=5e-4))
    while excess(root, accountant) > 0:
        root += 5e-4
    return math.exp(root)


def worst(releases: Iterable[Release], delta: float) -> Release | None:
    """The release of the largest epsilon, each of a data set of its own; None if there are none.

    Data sets that share no record compose in parallel. Renyi's accountant ranks them, because it is quick.
    """
    return max(releases, key=lambda r: compose([r], delta, "rdp"), default=None)
