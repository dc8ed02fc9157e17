"""What a partition is: it splits whatever has a length, labels and groups into parts, a million of them if need be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError

Indices = NDArray[np.int64]
Labels = NDArray[Any]  # (n,) integers, or names for `natural`
Parts = Sequence[Indices]  # of each client; of very many made when it is asked for
Split = Callable[[Any, int, np.random.Generator], Parts]  # such as `iid`: (targets or n, clients, rng)
_SHOWN = 1000  # clients, at most, that are described one by one


class Splittable(Protocol):
    """What a partitioner reads of a data set."""

    @property
    def targets(self) -> NDArray[np.int64] | None:
        """(n,) labels, or None."""
        ...

    @property
    def groups(self) -> Labels | None:
        """(n,) integers or names of authors, subjects, domains, or None."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class Partition(Protocol):
    """A configured way to split: a frozen dataclass whose fields are its hyper-parameters."""

    @property
    def uses_labels(self) -> bool:
        """Whether the split depends on the labels."""
        ...

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """Sorted positions of each client's examples; `rng` is the only source of randomness."""
        ...


def targets_of(data: Splittable, name: str) -> NDArray[np.int64]:
    """The labels that the partition `name` needs.

    Raises:
        ConfigError: there are none.
    """
    if data.targets is None:
        raise ConfigError(f"The {name} partition needs labels but this data set has none; use partition=iid.")
    return data.targets


class _Rows(Sequence[Indices]):
    """A sequence whose items are made when they are asked for."""

    def rows(self, client: int) -> Indices:
        """Of a client from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, client: int) -> Indices: ...
    @overload
    def __getitem__(self, client: slice) -> list[Indices]: ...
    def __getitem__(self, client: int | slice) -> Indices | list[Indices]:
        if isinstance(client, slice):
            return [self.rows(each) for each in range(*client.indices(len(self)))]
        return self.rows(range(len(self))[client])


@dataclass(frozen=True, eq=False)
class Dealt(_Rows):
    """Disjoint parts: all rows, client after client, and where each client's begin."""

    order: Indices  # (n,)
    edges: Indices  # (clients + 1,)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def rows(self, client: int) -> Indices:
        """A view."""
        return self.order[self.edges[client] : self.edges[client + 1]]


@dataclass(frozen=True, eq=False)
class Drawn(_Rows):
    """Parts that a rule gives, each when it is asked for. One example may be with several clients.

    Attributes:
        clients: their number.
        size: of every part.
        rule: client -> its sorted rows, always the same.
        name: tells the rule from others, for the fingerprint.
    """

    clients: int
    size: int
    rule: Callable[[int], Indices]
    name: str

    def __len__(self) -> int:
        return self.clients

    def rows(self, client: int) -> Indices:
        """Drawn anew."""
        return self.rule(client)


@dataclass(frozen=True, eq=False)
class Elsewhere(_Rows):
    """Clients whose examples are on their own nodes, so that nothing is known of them here."""

    clients: int

    def __len__(self) -> int:
        return self.clients

    def rows(self, client: int) -> Indices:
        """None is here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"the examples of client {client} are on its own node (partition=sites): choose a partition of common data"
        )


def parts_of(owner: Indices, clients: int) -> Parts:
    """Sorted indices per client from the (n,) owner of each example."""
    order = np.argsort(owner, kind="stable").astype(np.int64, copy=False)
    return Dealt(order, np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=clients)))))


def sizes_of(parts: Parts) -> NDArray[np.int64]:
    """(clients,) how many examples each has.

    Raises:
        ConfigError: that is known on their nodes only.
    """
    if isinstance(parts, Dealt):
        return np.diff(parts.edges)
    return np.full(len(parts), parts.size) if isinstance(parts, Drawn) else np.array([len(p) for p in parts], np.int64)


def rows_of(parts: Parts) -> Indices:
    """The rows of all clients, one client after the other.

    Raises:
        ConfigError: the parts overlap, so that an example has no owner.
    """
    if isinstance(parts, Elsewhere):
        parts[0]
    if isinstance(parts, Drawn):
        raise ConfigError("partition=virtual gives one example to several clients: use a partition of disjoint parts")
    return parts.order if isinstance(parts, Dealt) else np.concatenate(parts)


def owner_of(parts: Parts, n: int | None = None) -> Indices:
    """(n,) the client of each example, -1 for nobody: the inverse of `parts_of`; n: all that are held.

    Raises:
        ConfigError: see `rows_of`.
    """
    rows, sizes = rows_of(parts), sizes_of(parts)
    owner = np.full(len(rows) if n is None else n, -1)
    owner[rows] = np.repeat(np.arange(len(sizes)), sizes)
    return owner


def some_of(parts: Parts) -> tuple[Parts, int]:
    """Every k-th client's part, so that there are few enough to be shown, and k."""
    every = -(-len(parts) // _SHOWN)
    return parts[::every], every  # a list: those that a rule draws are drawn once
