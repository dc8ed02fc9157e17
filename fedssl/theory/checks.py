"""Refusals that several theory functions share; each returns its argument as float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedssl.errors import ConfigError

Array = NDArray[np.float64]


def matrix(name: str, x: ArrayLike) -> Array:
    """x as (N, D) with N, D >= 1."""
    found = np.asarray(x, dtype=np.float64)
    if found.ndim != 2 or found.size == 0:
        raise ConfigError(
            f"{name} has the shape {found.shape}, but rows and columns are needed; pass a matrix with at least one of "
            "each."
        )
    return found


def distribution(name: str, x: ArrayLike) -> Array:
    """x as non-negative numbers that sum to 1 (within 1e-9); the rounding is divided away."""
    found = np.asarray(x, dtype=np.float64)
    total = float(found.sum())
    if found.size == 0 or not np.all(found >= 0) or not abs(total - 1) <= 1e-9:  # also refuses nan
        raise ConfigError(
            f"{name} sums to {total:g} over {found.size} values, but a distribution has no negative value and the sum "
            "1; divide by the sum."
        )
    return found / total


def shares(weights: ArrayLike | None, count: int) -> Array:
    """Weights of `count` clients as shares that sum to 1; None means equal shares."""
    found = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if found.shape != (count,) or not np.all(found >= 0) or not 0 < float(found.sum()) < math.inf:
        raise ConfigError(
            f"The weights {found.tolist()} do not fit {count} clients; pass one weight >= 0 for each, not all 0."
        )
    share: Array = found / found.sum()
    return share


def positive(name: str, value: float) -> float:
    """A finite number above 0."""
    if not 0 < value < math.inf:  # also refuses nan
        raise ConfigError(f"{name} is {value}, but something is divided by it; pass a finite number above 0.")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """A finite number of at least 0."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value}, but it is a size; pass a finite number of at least 0.")
    return float(value)


def at_least(name: str, value: int, least: int) -> int:
    """A count of at least `least`."""
    if value < least:
        raise ConfigError(f"{name} is {value}, which is too few to compute anything; pass {least} or more.")
    return int(value)


def probability(name: str, value: float) -> float:
    """A number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}, but it is a probability; pass a number from 0 to 1.")
    return float(value)
