"""Examples that belong together, such as near-duplicates, stay with one client, whatever the split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError
from fedssl.partition.base import Indices, Labels, Partition, Parts, Split, Splittable, owner_of, parts_of
from fedssl.partition.draws import count
from fedssl.partition.even import iid


@dataclass(frozen=True)
class _First:
    """The first example of each cluster, as a partition reads it."""

    targets: NDArray[np.int64] | None
    groups: Labels | None
    n: int

    def __len__(self) -> int:
        return self.n


def keep_together(
    targets: Labels | int,
    clients: int,
    rng: np.random.Generator,
    *,
    clusters: Labels,
    base: Split = iid,
) -> Parts:
    """Splits the clusters' first examples with `base`; the others of a cluster follow theirs.

    What `base` promises (sizes, classes) therefore holds of the first examples.

    Args:
        targets: (n,) labels, or n where `base` needs none.
        clients: number of parts.
        rng: the only source of randomness.
        clusters: (n,) which examples belong together; one that stands alone has a cluster of its own.
        base: any partition function; its other arguments bound, e.g. `functools.partial(dirichlet, alpha=0.3)`.

    Raises:
        ConfigError: clusters of another length, or what `base` refuses, such as fewer clusters than clients.
    """
    first, cluster_of = _firsts(clusters, count(targets))
    own = len(first) if isinstance(targets, int | np.integer) else targets[first]
    return _spread(base(own, clients, rng), cluster_of, clients)


def split_together(
    data: Splittable, clients: int, rng: np.random.Generator, clusters: Labels, base: Partition
) -> Parts:
    """`keep_together` for a configured base, which may read labels or groups."""
    first, cluster_of = _firsts(clusters, len(data))
    targets, groups = (None if column is None else column[first] for column in (data.targets, data.groups))
    return _spread(base.split(_First(targets, groups, len(first)), clients, rng), cluster_of, clients)


def _firsts(clusters: Labels, n: int) -> tuple[Indices, Indices]:
    """The first example of each cluster, in their own order, and (n,) the number of each example's cluster."""
    if clusters.shape != (n,):
        raise ConfigError(f"clusters has shape {clusters.shape} but there are {n} examples; give one per example.")
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[inverse]


def _spread(parts: Parts, cluster_of: Indices, clients: int) -> Parts:
    return parts_of(owner_of(parts)[cluster_of], clients)
