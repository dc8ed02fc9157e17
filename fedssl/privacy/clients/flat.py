"""Flat clipping: all arrays of an update are one vector, whose length is bounded in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedssl.parts import Arrays

_GRID = 36  # binary digits below the bound: sums of up to 2^16 clipped vectors are exact in float64, in any order


def length(change: Mapping[str, np.ndarray]) -> float:
    """The L2 norm over all arrays, of any shape (0-d, empty) and type; nan if a value is not finite."""
    peaks = [float(np.abs(v.astype(np.float64)).max()) for v in change.values() if v.size]
    if not all(map(math.isfinite, peaks)):  # not of their maximum, in which a nan can be lost
        return math.nan
    largest = max(peaks, default=0.0)
    if largest == 0:
        return 0.0
    squares = (float(np.square(v.astype(np.float64) / largest).sum()) for v in change.values())  # no overflow
    return largest * math.sqrt(sum(squares))


def clip(change: Mapping[str, np.ndarray], bound: float, weight: float = 1.0) -> tuple[Arrays, float]:
    """The change, shortened to at most `bound` and multiplied by `weight`, as float64.

    Entries are cut, towards zero, to multiples of 2^-36 of the bound: no result is longer than `weight * bound`, and
    sums of results do not depend on the order of their terms.

    Args:
        change: any numbers.
        bound: above 0.
        weight: in [0, 1].

    Returns:
        The clipped change, all zeros for one that is not finite; and the length before, nan for such a one.
    """
    norm = length(change)
    if math.isnan(norm):
        return {key: np.zeros(value.shape) for key, value in change.items()}, norm
    factor = weight * min(1.0, bound / norm) if norm else weight
    step = 2.0 ** (math.floor(math.log2(bound)) - _GRID)
    clipped = {k: np.asarray(np.trunc(v.astype(np.float64) * (factor / step)) * step) for k, v in change.items()}
    return clipped, norm
