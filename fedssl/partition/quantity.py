"""Quantity skew: parts of unequal sizes whose labels are those of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl.partition.base import Indices, Labels, Parts, Splittable
from fedssl.partition.draws import at_least, check, check_options, count, cut, dirichlet_shares


def quantity_skew(
    targets: Labels | int, clients: int, rng: np.random.Generator, *, alpha: float, min_size: int = 2
) -> Parts:
    """Draws the parts' sizes from Dir(alpha) and fills them at random: unequal amounts, labels as in `iid`.

    Raises:
        ConfigError: alpha or min_size out of range, or fewer than clients * min_size examples.
    """
    n = count(targets)
    check_options(alpha, min_size)
    check(n, clients, min_size)

    def draw() -> Indices:
        owner = np.empty(n, np.int64)
        drawn = cut(n, dirichlet_shares(clients, alpha, rng))
        owner[rng.permutation(n)] = drawn
        return owner

    return at_least(draw, clients, min_size, rng)


@dataclass(frozen=True)
class QuantitySkew:
    """Unequal sizes from Dir(alpha), labels as in the whole."""

    alpha: float = 0.5
    min_size: int = 2
    uses_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self.alpha, self.min_size)

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `quantity_skew`."""
        return quantity_skew(len(data), clients, rng, alpha=self.alpha, min_size=self.min_size)
