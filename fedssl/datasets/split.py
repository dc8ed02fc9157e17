"""Choosing examples of one data set: a seeded division into training and test, and a balanced head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedssl.datasets.base import Labels
from fedssl.errors import ConfigError

Indices = NDArray[np.int64]


def stratified(targets: Labels | int, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Divides the examples at random, class by class, with `fraction` of each class in the second part.

    Args:
        targets: (n,) labels, or n where there are none.
        fraction: strictly between 0 and 1; rounded per class, so a class of one example stays in the first part.
        seed: a constant of the data set, not of the run: every run sees the same test set.

    Returns:
        Sorted positions of the first and of the second part, neither of them empty.

    Raises:
        ConfigError: fraction out of range, or a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"test_fraction is {fraction} but both parts need examples; choose it between 0 and 1.")
    labels = np.zeros(targets, np.int64) if isinstance(targets, int) else targets
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: round(fraction * len(members))]] = True
    if held.all() or not held.any():
        raise ConfigError(
            f"{len(labels)} examples with test_fraction {fraction} leave the training or the test set empty; "
            "give more examples or another fraction."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def balanced_head(targets: Labels | None, n: int, limit: int | None) -> Indices:
    """Sorted positions of the first `limit` of n examples, equally many of each class as far as they go.

    Raises:
        ConfigError: limit below 1.
    """
    if limit is None or limit >= n:
        return np.arange(n)
    if limit < 1:
        raise ConfigError(f"limit is {limit}, which leaves no example; use at least 1, or null for all.")
    if targets is None:
        return np.arange(limit)
    turn = np.zeros(n, np.int64)  # position of each example within its class
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        turn[members] = np.arange(len(members))
    return np.sort(np.argsort(turn, kind="stable")[:limit])
