"""Clients that the data set brings along: authors, subjects, domains, sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl.errors import ConfigError
from fedssl.partition.base import Labels, Parts, Splittable, parts_of


def natural(groups: Labels, clients: int, rng: np.random.Generator) -> Parts:
    """Keeps each group (author, subject, domain) on one client, with sizes as balanced as whole groups allow.

    Clients are numbered by their smallest group, so with as many clients as groups, client i is the i-th group.

    Raises:
        ConfigError: more clients than groups.
    """
    ids, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not 1 <= clients <= len(ids):
        raise ConfigError(
            f"{clients} clients were asked for but the data has {len(ids)} groups and a group is not divided; "
            f"use between 1 and {len(ids)} clients."
        )
    client_of = np.empty(len(ids), np.int64)
    load = np.zeros(clients, np.int64)
    shuffled = rng.permutation(len(ids))
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        client_of[group] = np.argmin(load)  # the largest group left goes to the smallest client
        load[client_of[group]] += sizes[group]
    first = np.full(clients, len(ids))
    np.minimum.at(first, client_of, np.arange(len(ids)))
    rank = np.argsort(np.argsort(first))
    return parts_of(rank[client_of][inverse], clients)


@dataclass(frozen=True)
class Natural:
    """Whole groups of the data set: authors, subjects, domains, sources."""

    uses_labels: ClassVar[bool] = False

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `natural`."""
        if data.groups is None:
            raise ConfigError("The natural partition needs groups but this data set has none; use partition=iid.")
        return natural(data.groups, clients, rng)
