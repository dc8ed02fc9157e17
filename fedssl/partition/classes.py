"""A fixed number of classes a client: the pathological split in the three ways in which papers make it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl.errors import ConfigError
from fedssl.partition.base import Indices, Labels, Parts, Splittable, parts_of, targets_of
from fedssl.partition.draws import check

ASSIGN = ("drawn", "turn", "shards")


def pathological(
    targets: Labels, clients: int, rng: np.random.Generator, *, classes_per_client: int, assign: str = "drawn"
) -> Parts:
    """Gives every client examples of `classes_per_client` classes; with all of them, drawn or in turn, it is even.

    Args:
        targets: (n,) labels.
        clients: number of parts.
        rng: the only source of randomness.
        classes_per_client: from 1 (a class may be shared by several clients) to the number of classes.
        assign: "drawn": exactly so many, chosen at random; large classes get more holders, so that parts are of similar
            size. "turn": exactly so many, in turn: client i holds classes i*k, i*k + 1, .. modulo their number, as
            EasyFL deals them for FedU and FedEMA. "shards": the examples sorted by label are cut into clients * k equal
            shards and each client draws k of them, as McMahan et al. and MocoSFL do: a shard may straddle two classes
            and two shards may share one, so k is a rule of thumb. A class or shard is never dropped, where EasyFL
            drops the rest that does not divide evenly.

    Raises:
        ConfigError: the numbers do not allow it, e.g. clients * classes_per_client < number of classes.

    References:
        McMahan et al. 2017, arXiv:1602.05629; Zhuang et al. 2022, arXiv:2204.04385 (EasyFL, `non_iid_class`);
        Li et al. 2023, MocoSFL (`noniid_alllabel`, with noniid_ratio = k / number of classes).
    """
    k = classes_per_client
    _check_options(k, assign)
    check(len(targets), clients, 1)
    labels, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    if k > len(labels):
        raise ConfigError(
            f"classes_per_client is {k} but the data has {len(labels)} classes; choose it between 1 and {len(labels)}."
        )
    if clients * k < len(labels):
        raise ConfigError(
            f"{clients} clients with {k} classes each cannot hold all {len(labels)} classes; "
            f"use more clients or classes_per_client of at least {math.ceil(len(labels) / clients)}."
        )
    turns = np.arange(clients * k) % len(labels)  # the class that each place of each client takes in turn
    room = np.minimum(sizes, clients) if assign == "drawn" else sizes
    if room.sum() < clients * k or (assign == "turn" and np.any(np.bincount(turns) > sizes)):
        raise ConfigError(
            f"{len(targets)} examples are too few for {clients} clients to hold {k} classes each; "
            "use fewer clients or fewer classes per client."
        )
    if assign == "shards":
        return _shards(inverse, clients, k, rng)
    if assign == "turn":
        holders = [(np.flatnonzero(turns == label) // k).tolist() for label in range(len(labels))]
    else:
        holders = _assign(_slots(sizes, clients, k, rng), clients, k, rng)
    owner = np.empty(len(targets), np.int64)
    for label, held_by in enumerate(holders):
        index = rng.permutation(np.flatnonzero(inverse == label))
        owner[index] = rng.permutation(held_by)[np.arange(len(index)) % len(held_by)]
    return parts_of(owner, clients)


@dataclass(frozen=True)
class Pathological:
    """Label skew: a fixed number of classes per client."""

    classes_per_client: int = 2
    assign: str = "drawn"
    uses_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_options(self.classes_per_client, self.assign)

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `pathological`."""
        targets = targets_of(data, "pathological")
        return pathological(targets, clients, rng, classes_per_client=self.classes_per_client, assign=self.assign)


def _check_options(k: int, assign: str) -> None:
    if k < 1:
        raise ConfigError(f"classes_per_client is {k}; a client needs at least 1.")
    if assign not in ASSIGN:
        raise ConfigError(f"assign is {assign!r}, which is not known; use {', '.join(ASSIGN)}.")


def _shards(labels: Indices, clients: int, k: int, rng: np.random.Generator) -> Parts:
    """Equal shards of the examples sorted by label, `k` drawn by each client."""
    n, shards = len(labels), clients * k
    drawn = rng.permutation(shards) // k  # (shards,) the client of each
    shuffled = rng.permutation(n)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner = np.empty(n, np.int64)
    owner[by_label] = drawn[np.arange(n) * shards // n]
    return parts_of(owner, clients)


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
