"""Who can be asked in a round: by time of day, by the round of joining, or by a recorded trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fedssl import seeds
from fedssl.errors import ConfigError


@lru_cache(maxsize=4)
def _zones(clients: int, zones: int, seed: int) -> np.ndarray:
    return seeds.stream(seed, "zone").integers(zones, size=clients)


@dataclass(frozen=True)
class DayNight:
    """Each client is there for a part of each day, the same part every day.

    Attributes:
        period: rounds a day.
        awake: share of the day in which a client is there, in (0, 1].
        zones: time zones, spread evenly over the day, one drawn for each client; 1: all sleep at once, and rounds in
            their night have nobody.
    """

    period: int = 8
    awake: float = 0.5
    zones: int = 4

    def __post_init__(self) -> None:
        if min(self.period, self.zones) < 1 or not 0 < self.awake <= 1:
            raise ConfigError(
                f"available: period={self.period}, awake={self.awake}, zones={self.zones} are no days: give a period "
                "and zones of at least 1, and awake in (0, 1]"
            )

    def available(self, clients: int, at: int, seed: int) -> Sequence[int]:
        """See `Availability`."""
        hours = (at - 1 + np.arange(self.zones) * self.period / self.zones) % self.period
        return _indices((hours < self.awake * self.period)[_zones(clients, self.zones, seed)])


@lru_cache(maxsize=4)
def _joins(clients: int, share: float, by: int, seed: int) -> np.ndarray:
    rng = seeds.stream(seed, "join")
    late = rng.random(clients) < share
    return np.where(late, rng.integers(2, by, size=clients, endpoint=True), 1)


@dataclass(frozen=True)
class LateJoiners:
    """Some clients join while the run goes on, and stay.

    Attributes:
        late: share of the clients that are not there from the first round.
        by: the round by which all have joined; each joins in a random one of 2 .. by.
    """

    late: float = 0.5
    by: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.late <= 1 or self.by < 2:
            raise ConfigError(
                f"available: late={self.late} of the clients join by round {self.by}: give a share in [0, 1] and a "
                "round from 2 on"
            )

    def available(self, clients: int, at: int, seed: int) -> Sequence[int]:
        """See `Availability`."""
        return _indices(_joins(clients, self.late, self.by, seed) <= at)


@dataclass(frozen=True)
class Trace:
    """A recording of who was there, round by round; a run that is longer starts it again.

    Attributes:
        path: a .json file with one list of clients for each round, such as [[0, 1, 2], [], [1]], or a .npz file with
            an array `available` of truth values, (rounds, clients). Read by the server only.
    """

    path: str

    def available(self, clients: int, at: int, seed: int) -> Sequence[int]:
        """See `Availability`.

        Raises:
            ConfigError: the file is not a trace of so many clients.
        """
        rounds = read_trace(self.path)
        there = rounds[(at - 1) % len(rounds)]
        if len(there) and int(there[-1]) >= clients:
            raise ConfigError(
                f"{self.path} has client {there[-1]} in round {at}, and federation.clients={clients}: "
                "set federation.clients to the trace's, counted from 0"
            )
        return there


def read_trace(path: str) -> tuple[Sequence[int], ...]:
    """Who was there in each round, sorted; read again when the file has changed.

    Raises:
        ConfigError: the file is missing or not a trace.
    """
    try:
        return _read(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): pass the path of a trace") from error


@lru_cache(maxsize=2)
def _read(path: str, changed: int) -> tuple[Sequence[int], ...]:
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as archive:
                table = np.asarray(archive["available"], bool)
            rounds = [_indices(row) for row in table.reshape(len(table), -1)]
        else:
            lists = json.loads(Path(path).read_text(encoding="utf-8"))
            rounds = [sorted({int(client) for client in clients}) for clients in lists]
    except (ValueError, TypeError, KeyError, OverflowError, BadZipFile) as error:
        raise ConfigError(
            f"{path} is not a trace: give JSON lists of clients, one a round, or an npz with a (rounds, clients) array "
            "'available'"
        ) from error
    if not rounds or any(len(clients) and clients[0] < 0 for clients in rounds):
        raise ConfigError(f"{path} is not a trace: it has no rounds, or a client below 0; clients count from 0")
    return tuple(rounds)


def _indices(mask: np.ndarray) -> Sequence[int]:
    found: Sequence[int] = np.flatnonzero(mask)  # type: ignore[assignment]  # an array is a sequence that says not so
    return found
