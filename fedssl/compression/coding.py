"""Numbers to few bytes and back: values on a grid with one scale an array, positions as gaps of one byte."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

KINDS: Mapping[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
LARGEST = float(np.finfo(np.float32).max) / 2  # no value beyond it can be coded: rounding up must not overflow
_SKIP = 255  # of a gap: as many are left out, and the gap goes on


def scale_of(values: np.ndarray, kind: str) -> np.float32:
    """What the codes of `values` (n,) float32 are multiplied with; at most LARGEST, never 0.

    int8: the step of the grid, the least with 127 steps up to the largest value. float16: the power of two that brings
    the largest value to the upper end of its range, so that updates of 1e-8 keep as many digits as those of 1.
    """
    largest = np.abs(values).max(initial=0).astype(np.float32)
    if kind == "float32" or largest == 0:
        return np.float32(1)
    if kind == "float16":
        return np.float32(2.0 ** max(int(np.frexp(largest)[1]) - 15, -126))
    step = np.float32(largest / np.float32(127))
    return step if step * np.float32(127) >= largest else np.nextafter(step, np.float32(np.inf))


def to_codes(values: np.ndarray, scale: np.float32, kind: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Code (n,) float32 values as `kind`.

    Rounds to the nearest, so the error is at most half a step of int8 and 2^-11 of a value of float16, and what is lost
    (`values - from_codes(...)`) is exact in float32. With `rng`, int8 rounds up or down at random with the mean at the
    value: the error is at most a step and 0 in expectation.
    """
    if kind != "int8":
        return (values / scale).astype(KINDS[kind])
    steps = values / scale
    steps = np.rint(steps) if rng is None else np.floor(steps + rng.random(steps.shape, np.float32))
    return np.clip(steps, -127, 127).astype(np.int8)


def from_codes(codes: np.ndarray, scale: np.float32 | np.ndarray) -> np.ndarray:
    """The (n,) float32 values of the codes, for one scale or one each."""
    return np.asarray(codes.astype(np.float32) * scale)


def to_gaps(positions: np.ndarray) -> np.ndarray:
    """Code increasing positions as (m,) uint8: how many are left out before each; 255 leaves out 255 and goes on.

    Of k positions below n, m is at most k + n / 255.
    """
    skips, rest = np.divmod(np.diff(positions, prepend=-1) - 1, _SKIP)
    ends = np.cumsum(skips + 1) - 1
    gaps = np.full(len(positions) + int(skips.sum()), _SKIP, np.uint8)
    gaps[ends] = rest
    return gaps


def from_gaps(gaps: np.ndarray) -> np.ndarray:
    """The (k,) int64 positions of (m,) uint8 gaps."""
    ends = gaps != _SKIP
    return np.asarray(np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(np.count_nonzero(ends)))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The positions, increasing, of the `count` values (n,) of largest magnitude; zeros are never among them.

    Of equal magnitudes the first ones are taken, so the choice is the same on every machine.
    """
    size = np.abs(values)
    if count < len(size):
        edge = np.partition(size, len(size) - count)[len(size) - count] if count else np.inf
        above = size > edge
        level = np.flatnonzero(size == edge)[: count - np.count_nonzero(above)]
        above[level] = True
        size = np.where(above, size, 0)
    return np.flatnonzero(size)
