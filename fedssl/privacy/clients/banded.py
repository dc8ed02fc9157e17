"""Banded matrix mechanisms: noise of one round that takes back a part of the noise of the rounds before.

The mean changes x_1 .. x_T are released as `x + sigma C^-1 Z`, with a lower-triangular Toeplitz matrix C of `band`
non-zero diagonals. That is a post-processing of `C x + sigma Z`, one Gaussian release of the whole run, whose
sensitivity is how far one client moves `C x`. The noise of the sum of all rounds, which is what training adds up,
grows much slower than that of independent noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

Coefficients = Sequence[float] | np.ndarray


def square_root(band: int) -> np.ndarray:
    """(band,) the first coefficients of the square root of the prefix-sum matrix: binom(2j, j) / 4^j.

    The whole square root is optimal among Toeplitz factors up to a constant; cut to a band it keeps its inverse's noise
    small where clients return after `band` rounds (Kalinin & Lampert 2024, https://arxiv.org/abs/2405.13763).
    """
    return np.array([math.comb(2 * j, j) / 4.0**j for j in range(band)])


def columns(coefficients: Coefficients, rounds: int) -> np.ndarray:
    """(T, T) the lower-triangular Toeplitz matrix with these coefficients on its first diagonals."""
    matrix = np.zeros((rounds, rounds))
    for j, value in enumerate(coefficients[:rounds]):
        matrix += value * np.eye(rounds, k=-j)
    return matrix


def sensitivity(coefficients: Coefficients, rounds: int, separation: int) -> float:
    """How far one client with updates of norm at most 1 moves C x, whichever rounds it takes part in.

    Turns are at least `separation >= band` rounds apart, so the columns that they touch share no row and the squares of
    their lengths add up. A later column is cut by the end of the run and no longer than an earlier one: the worst
    pattern begins in round 1 and is as dense as it may be.

    Args:
        coefficients: (band,) of C.
        rounds: T.
        separation: rounds from one turn of a client to the next, at least.

    References:
        Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153, section 3
    """
    squares = np.cumsum(np.square(coefficients))
    starts = range(0, rounds, separation)
    return math.sqrt(sum(float(squares[min(len(squares), rounds - start) - 1]) for start in starts))


def correlated(coefficients: Coefficients, fresh: np.ndarray, earlier: Iterable[np.ndarray]) -> np.ndarray:
    """The next row of C^-1 Z: what is fresh, less what the rows before it already hold.

    Args:
        coefficients: (band,) of C, the first not 0.
        fresh: the row of Z of this round, of any shape.
        earlier: the rows of C^-1 Z of the rounds before, the last one first; those beyond the band are not read.
    """
    row = fresh.astype(np.float64)
    for value, before in zip(coefficients[1:], earlier, strict=False):
        row = row - value * before
    return np.asarray(row / coefficients[0])
