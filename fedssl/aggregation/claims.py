"""What every client-level mechanism says alike: its noise, its delta, its budget and its declaration."""

from __future__ import annotations

import math
from functools import lru_cache

from fedssl.errors import ConfigError, PrivacyError
from fedssl.privacy.release import gaussian_epsilon
from fedssl.privacy.statement import Declared

LARGEST_DELTA = 1e-3
RELATIONS = {
    "add_remove": "one client added or removed",
    "zero_out": "all updates of one client replaced by zeros",
    "replace_one": "all updates of one client replaced by any others",
}
NOT_COVERED = (
    "what stays in the run directory on the server: who took part when, failures, and updates that were not finite",
    "parts of a model that stay on a client",
    "the spacing of floating-point numbers in the noise",
)


def check_noise(noise_multiplier: float | None, target_epsilon: float | None, clip: float) -> None:
    """Refuse a clip norm or noise that mean nothing.

    Raises:
        ConfigError: the clip norm is not above 0, or not exactly one of noise and epsilon is given, above 0.
    """
    if not (clip > 0 and math.isfinite(clip)):
        raise ConfigError(f"aggregation.clip={clip} bounds no update: give a number above 0")
    given = [value for value in (noise_multiplier, target_epsilon) if value is not None]
    if len(given) != 1 or not (given[0] > 0 and math.isfinite(given[0])):
        raise ConfigError(
            f"aggregation.noise_multiplier={noise_multiplier} and target_epsilon={target_epsilon} fix no noise: "
            "give one of them above 0, and null for the other"
        )


def delta_of(delta: float | None, clients: int) -> float:
    """The given delta, or clients^-1.1.

    Raises:
        PrivacyError: there are too few clients for that to mean anything, or the given one is no probability.
    """
    if delta is not None:
        if not 0 < delta < 1:
            raise PrivacyError(f"aggregation.delta={delta} is no probability of failure: give a number in (0, 1)")
        return delta
    own = float(clients**-1.1)
    if own > LARGEST_DELTA:
        raise PrivacyError(
            f"{clients} clients would give delta={own:.2g}, with which a mechanism may publish one client in "
            f"{1 / own:.0f}: use at least 534 clients, or say aggregation.delta=1e-5 yourself"
        )
    return own


@lru_cache(maxsize=64)
def gaussian_multiplier(target_epsilon: float, releases: int, delta: float) -> float:
    """The noise, over the sensitivity, with which so many Gaussian releases cost exactly this epsilon.

    The inverse of `fedssl.privacy.release.gaussian_epsilon` (Balle & Wang 2018, https://arxiv.org/abs/1805.06530),
    rounded up; no sampling is assumed.
    """

    from scipy.optimize import brentq  # here, because it takes a while to import

    def excess(log_noise: float) -> float:
        return math.log(max(gaussian_epsilon(math.exp(log_noise), releases, delta), 1e-300) / target_epsilon)

    return math.exp(float(brentq(excess, -10.0, 30.0, xtol=1e-13)) + 1e-12)


def declare(
    adversary: str, relation: str, sampler: str, released: str, secure: bool, budget: tuple[float | None, float]
) -> Declared:
    """A declaration for the unit `client`."""
    words = (adversary, sampler, released)
    return Declared("client", RELATIONS[relation], *words, budget[1], budget[0], not secure, NOT_COVERED)
