"""Independent and identically distributed clients: shuffled examples, dealt out evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl.partition.base import Labels, Parts, Splittable, parts_of
from fedssl.partition.draws import check, count


def iid(targets: Labels | int, clients: int, rng: np.random.Generator) -> Parts:
    """Deals the shuffled examples out evenly; sizes differ by at most one.

    Raises:
        ConfigError: fewer examples than clients.
    """
    n = count(targets)
    check(n, clients, 1)
    owner = np.empty(n, np.int64)
    owner[rng.permutation(n)] = np.arange(n) % clients
    return parts_of(owner, clients)


@dataclass(frozen=True)
class Iid:
    """Shuffled and dealt out evenly."""

    uses_labels: ClassVar[bool] = False

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `iid`."""
        return iid(len(data), clients, rng)
