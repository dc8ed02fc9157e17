"""Cohorts that take turns: a client that has taken part waits until all others have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.participation.base import DROPPED, Attendance, Turn, check_dropout, drops, in_order


@dataclass(frozen=True)
class Cohorts:
    """Every client belongs to one of so many cohorts, and cohort (round - 1) modulo their number takes part.

    Two turns of a client are then exactly `groups` rounds apart, which banded noise needs (min-separation), and a
    client has at most ceil(rounds / groups) turns. Nothing is sampled: everybody may know who takes part when.

    Attributes:
        groups: cohorts, at least 1 (everybody, always). Their sizes differ by at most one.
        dropout: probability that a client fails during its turn and its update never comes.
    """

    groups: int = 4
    dropout: float = 0.0
    max_staleness: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigError(f"participation.groups={self.groups} are no cohorts: give at least 1")
        check_dropout(self.dropout)

    def plan(self, clients: int, at: int, seed: int) -> Attendance:
        """See `Participation`."""
        order = seeds.stream(seed, "cohorts").permutation(clients)
        mine = (int(client) for client in order[(at - 1) % self.groups :: self.groups])
        lost = {True: DROPPED, False: ""}
        return Attendance(
            in_order(Turn(client, at - 1, lost=lost[drops(self.dropout, client, at, seed)]) for client in mine)
        )

    def scale(self, staleness: int) -> float:
        """Updates are merged as they are."""
        return 1.0
