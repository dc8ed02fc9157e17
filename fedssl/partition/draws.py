"""What the partitions share: checks of numbers, cuts in drawn proportions, and a smallest size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError
from fedssl.partition.base import Indices, Labels, Parts, parts_of

REDRAWS = 20  # draws tried for `min_size` before examples are moved


def count(targets: Labels | int) -> int:
    """How many examples there are."""
    return int(targets) if isinstance(targets, int | np.integer) else len(targets)


def check(n: int, clients: int, min_size: int) -> None:
    """Refuse more clients than examples.

    Raises:
        ConfigError: no client, or fewer than clients * min_size examples.
    """
    if clients < 1:
        raise ConfigError(f"{clients} clients were asked for; a split needs at least one.")
    if clients * min_size > n:
        raise ConfigError(
            f"{n} examples cannot give {clients} clients {min_size} or more each; use at most {n // min_size} clients."
        )


def check_options(alpha: float, min_size: int, name: str = "alpha") -> None:
    """Refuse a concentration or a smallest size that no split can have.

    Raises:
        ConfigError: alpha not finite and above 0, or min_size below 1.
    """
    if min_size < 1:
        raise ConfigError(f"min_size is {min_size} but a client without examples cannot train; use at least 1.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"{name} is {alpha} but a Dirichlet distribution needs a finite number above 0, e.g. 0.3.")


def cut(n: int, shares: NDArray[np.float64]) -> Indices:
    """(n,) non-decreasing owners in proportion to `shares`, which add up to 1."""
    edges = (np.cumsum(shares)[:-1] * n).astype(np.int64)
    return np.searchsorted(edges, np.arange(n), side="right").astype(np.int64, copy=False)


def dirichlet_shares(clients: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(clients,) proportions from Dir(alpha)."""
    return rng.dirichlet(np.full(clients, alpha))


def at_least(draw: Callable[[], Indices], clients: int, min_size: int, rng: np.random.Generator) -> Parts:
    """The first draw whose parts all have `min_size`, else the last one repaired; the caller checked n."""
    for _ in range(REDRAWS):
        owner = draw()
        sizes = np.bincount(owner, minlength=clients)
        if sizes.min() >= min_size:
            return parts_of(owner, clients)
    piles = [list(rng.permutation(part)) for part in parts_of(owner, clients)]
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            donor = int(np.argmax(sizes))  # n >= clients * min_size, so the largest can spare one
            owner[piles[donor].pop()] = client
            sizes[donor] -= 1
            sizes[client] += 1
    return parts_of(owner, clients)
