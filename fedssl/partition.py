"""How one data set is divided among clients: pure functions of (targets or n, clients, rng), and the same as options.

Every function returns `clients` disjoint, sorted int64 index arrays, none of them empty, that hold every example.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError

Indices = NDArray[np.int64]
Labels = NDArray[Any]  # (n,) integers, or names for `natural`

REDRAWS = 20  # draws tried for `min_size` before examples are moved


class Splittable(Protocol):
    """What a partitioner reads of a data set."""

    @property
    def targets(self) -> NDArray[np.int64] | None: ...
    @property
    def groups(self) -> Labels | None: ...
    def __len__(self) -> int: ...


class Partition(Protocol):
    """A configured way to split: a frozen dataclass whose fields are its hyper-parameters."""

    uses_labels: ClassVar[bool]

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]: ...


def iid(targets: Labels | int, clients: int, rng: np.random.Generator) -> list[Indices]:
    """Deals the shuffled examples out evenly; sizes differ by at most one.

    Raises:
        ConfigError: fewer examples than clients.
    """
    n = _count(targets)
    _check(n, clients, 1)
    owner = np.empty(n, np.int64)
    owner[rng.permutation(n)] = np.arange(n) % clients
    return _parts(owner, clients)


def dirichlet(
    targets: Labels, clients: int, rng: np.random.Generator, *, alpha: float, min_size: int = 2
) -> list[Indices]:
    """Divides each class among the clients in proportions drawn from Dir(alpha): label skew.

    Args:
        targets: (n,) labels.
        clients: number of parts.
        rng: the only source of randomness.
        alpha: > 0; small: a client sees few classes; large: the split tends to `iid`.
        min_size: >= 1; re-drawn up to `REDRAWS` times until it holds, then examples move from the largest parts.

    Raises:
        ConfigError: alpha or min_size out of range, or fewer than clients * min_size examples.

    References:
        Hsu et al. 2019, arXiv:1909.06335; Li et al. 2022, arXiv:2102.02079.
    """
    _check_options(alpha, min_size)
    _check(len(targets), clients, min_size)
    members = [np.flatnonzero(targets == label) for label in np.unique(targets)]

    def draw() -> Indices:
        owner = np.empty(len(targets), np.int64)
        for index in members:
            owner[rng.permutation(index)] = _cut(len(index), clients, alpha, rng)
        return owner

    return _at_least(draw, clients, min_size, rng)


def pathological(targets: Labels, clients: int, rng: np.random.Generator, *, classes_per_client: int) -> list[Indices]:
    """Gives every client examples of exactly `classes_per_client` classes, chosen at random; every class is held.

    A class is divided evenly among its holders, and large classes get more holders, so parts are of similar size.

    Raises:
        ConfigError: the numbers do not allow it, e.g. clients * classes_per_client < number of classes.

    References:
        McMahan et al. 2017, arXiv:1602.05629 (their shards give *about* two classes; here the number is exact).
    """
    _check(len(targets), clients, 1)
    k = classes_per_client
    labels, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    if not 1 <= k <= len(labels):
        raise ConfigError(
            f"classes_per_client is {k} but the data has {len(labels)} classes; choose it between 1 and {len(labels)}."
        )
    if clients * k < len(labels):
        raise ConfigError(
            f"{clients} clients with {k} classes each cannot hold all {len(labels)} classes; "
            f"use more clients or classes_per_client of at least {math.ceil(len(labels) / clients)}."
        )
    if np.minimum(sizes, clients).sum() < clients * k:
        raise ConfigError(
            f"{len(targets)} examples are too few for {clients} clients to hold {k} classes each; "
            "use fewer clients or fewer classes per client."
        )
    owner = np.empty(len(targets), np.int64)
    holders = _assign(_slots(sizes, clients, k, rng), clients, k, rng)
    for label, held_by in enumerate(holders):
        index = rng.permutation(np.flatnonzero(inverse == label))
        owner[index] = rng.permutation(held_by)[np.arange(len(index)) % len(held_by)]
    return _parts(owner, clients)


def quantity_skew(
    targets: Labels | int, clients: int, rng: np.random.Generator, *, alpha: float, min_size: int = 2
) -> list[Indices]:
    """Draws the parts' sizes from Dir(alpha) and fills them at random: unequal amounts, labels as in `iid`.

    Raises:
        ConfigError: alpha or min_size out of range, or fewer than clients * min_size examples.
    """
    n = _count(targets)
    _check_options(alpha, min_size)
    _check(n, clients, min_size)

    def draw() -> Indices:
        owner = np.empty(n, np.int64)
        owner[rng.permutation(n)] = _cut(n, clients, alpha, rng)
        return owner

    return _at_least(draw, clients, min_size, rng)


def natural(groups: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
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
    return _parts(rank[client_of][inverse], clients)


@dataclass(frozen=True)
class Iid:
    """Shuffled and dealt out evenly."""

    uses_labels: ClassVar[bool] = False

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]:
        """See `iid`."""
        return iid(len(data), clients, rng)


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: class proportions from Dir(alpha)."""

    alpha: float = 0.3
    min_size: int = 2
    uses_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_options(self.alpha, self.min_size)

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]:
        """See `dirichlet`."""
        return dirichlet(_targets(data, "dirichlet"), clients, rng, alpha=self.alpha, min_size=self.min_size)


@dataclass(frozen=True)
class Pathological:
    """Label skew: a fixed number of classes per client."""

    classes_per_client: int = 2
    uses_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.classes_per_client < 1:
            raise ConfigError(f"classes_per_client is {self.classes_per_client}; a client needs at least 1.")

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]:
        """See `pathological`."""
        targets = _targets(data, "pathological")
        return pathological(targets, clients, rng, classes_per_client=self.classes_per_client)


@dataclass(frozen=True)
class QuantitySkew:
    """Unequal sizes from Dir(alpha), labels as in the whole."""

    alpha: float = 0.5
    min_size: int = 2
    uses_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_options(self.alpha, self.min_size)

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]:
        """See `quantity_skew`."""
        return quantity_skew(len(data), clients, rng, alpha=self.alpha, min_size=self.min_size)


@dataclass(frozen=True)
class Natural:
    """Whole groups of the data set: authors, subjects, domains."""

    uses_labels: ClassVar[bool] = False

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]:
        """See `natural`."""
        if data.groups is None:
            raise ConfigError("The natural partition needs groups but this data set has none; use partition=iid.")
        return natural(data.groups, clients, rng)


def fingerprint(parts: Sequence[Indices]) -> str:
    """The sha256 of a split in hex: equal exactly when the parts are equal, on every platform."""
    digest = hashlib.sha256(np.array([len(part) for part in parts], dtype="<i8").tobytes())
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return digest.hexdigest()


def heterogeneity(parts: Sequence[Indices], targets: Labels | None) -> dict[str, float]:
    """How unequal a split is.

    Returns:
        label_emd: mean over clients, weighted by size, of half the L1 distance between the client's label distribution
            and that of all parts together, in [0, 1]: 0 equal, 1 - 1/K when each client has one of K equal classes.
            Absent without targets.
        gini: of the sizes, in [0, 1): 0 equal, towards 1 when one client has everything.
        smallest, largest: sizes.
    """
    sizes = np.sort(np.array([len(part) for part in parts], np.int64))
    total, clients = int(sizes.sum()), len(sizes)
    gini = float((2 * np.arange(1, clients + 1) - clients - 1) @ sizes / (clients * total))
    found = {"gini": gini, "smallest": float(sizes[0]), "largest": float(sizes[-1])}
    if targets is not None:
        labels, inverse = np.unique(targets, return_inverse=True)
        counts = np.stack([np.bincount(inverse[part], minlength=len(labels)) for part in parts]).astype(np.float64)
        whole = counts.sum(0) / total
        own = counts.sum(1, keepdims=True)
        found["label_emd"] = float(np.abs(counts - own * whole).sum() / 2 / total)
    return found


def _count(targets: Labels | int) -> int:
    return int(targets) if isinstance(targets, int | np.integer) else len(targets)


def _check(n: int, clients: int, min_size: int) -> None:
    if clients < 1:
        raise ConfigError(f"{clients} clients were asked for; a split needs at least one.")
    if clients * min_size > n:
        raise ConfigError(
            f"{n} examples cannot give {clients} clients {min_size} or more each; use at most {n // min_size} clients."
        )


def _check_options(alpha: float, min_size: int) -> None:
    if min_size < 1:
        raise ConfigError(f"min_size is {min_size} but a client without examples cannot train; use at least 1.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha is {alpha} but a Dirichlet distribution needs a finite number above 0, e.g. 0.3.")


def _targets(data: Splittable, name: str) -> NDArray[np.int64]:
    if data.targets is None:
        raise ConfigError(f"The {name} partition needs labels but this data set has none; use partition=iid.")
    return data.targets


def _parts(owner: Indices, clients: int) -> list[Indices]:
    """Sorted indices per client from the (n,) owner of each example."""
    order = np.argsort(owner, kind="stable").astype(np.int64, copy=False)
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _cut(n: int, clients: int, alpha: float, rng: np.random.Generator) -> Indices:
    """(n,) non-decreasing owners in Dir(alpha) proportions."""
    edges = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * n).astype(np.int64)
    return np.searchsorted(edges, np.arange(n), side="right").astype(np.int64, copy=False)


def _at_least(draw: Callable[[], Indices], clients: int, min_size: int, rng: np.random.Generator) -> list[Indices]:
    """The first draw whose parts all have `min_size`, else the last one repaired; the caller checked n."""
    for _ in range(REDRAWS):
        owner = draw()
        sizes = np.bincount(owner, minlength=clients)
        if sizes.min() >= min_size:
            return _parts(owner, clients)
    piles = [list(rng.permutation(part)) for part in _parts(owner, clients)]
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            donor = int(np.argmax(sizes))  # n >= clients * min_size, so the largest can spare one
            owner[piles[donor].pop()] = client
            sizes[donor] -= 1
            sizes[client] += 1
    return _parts(owner, clients)


def _slots(sizes: Indices, clients: int, k: int, rng: np.random.Generator) -> Indices:
    """(K,) how many clients hold each class: one each, then the class with most examples per holder gets the next."""
    slots = np.ones(len(sizes), np.int64)
    tie = rng.permutation(len(sizes))
    for _ in range(clients * k - len(sizes)):
        share = np.where(slots < clients, sizes / (slots + 1), -1.0)
        slots[tie[np.argmax(share[tie])]] += 1
    return slots


def _assign(slots: Indices, clients: int, k: int, rng: np.random.Generator) -> list[list[int]]:
    """The clients that hold each class, `k` different classes a client, drawn at random."""
    left, holders = slots.copy(), [list[int]() for _ in slots]
    for client in range(clients):
        urgent = left == clients - client  # every client still to come must hold it
        weight = np.where(urgent, np.inf, rng.random(len(left)) * left)
        for label in np.argsort(-weight, kind="stable")[:k]:
            holders[label].append(client)
            left[label] -= 1
    return holders
