"""Rounds that wait for their cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.participation.base import (
    DROPPED,
    LATE,
    Attendance,
    Availability,
    Pace,
    Turn,
    check_dropout,
    drops,
    in_order,
    pool,
)


@dataclass(frozen=True)
class Synchronous:
    """Each round draws a cohort from the clients that are available and waits for it, or until a deadline.

    Attributes:
        fraction: of all clients, in (0, 1].
        draw: "uniform" takes round(fraction * clients) of them without replacement, at least one, or all that are
            available if they are fewer; "poisson" takes each available client on its own with this probability, so
            that a cohort may be empty.
        available: which clients can be asked; null: all, always.
        pace: how long a client needs for its local steps; null: nobody is late.
        deadline_s: how long a round waits; null: as long as it takes.
        late: what becomes of a client that would need longer: "partial", it does the share of its steps that fits,
            or "out", its round is lost.
        dropout: probability that a client fails during its turn and its update never comes.
    """

    fraction: float = 1.0
    draw: str = "uniform"
    available: Availability | None = None
    pace: Pace | None = None
    deadline_s: float | None = None
    late: str = "partial"
    dropout: float = 0.0
    max_staleness: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"participation.fraction={self.fraction} is a share of the clients: give a number in (0, 1]"
            )
        for name, word, words in (
            ("draw", self.draw, ("uniform", "poisson")),
            ("late", self.late, ("partial", "out")),
        ):
            if word not in words:
                raise ConfigError(f"participation.{name}={word!r} is unknown: use {' or '.join(words)}")
        if self.deadline_s is not None and not (self.deadline_s > 0 and self.pace is not None):
            raise ConfigError(
                f"participation.deadline_s={self.deadline_s} needs to be above 0, and clients that have a pace: "
                "add pace@participation.pace=lognormal, or set participation.deadline_s=null"
            )
        check_dropout(self.dropout)

    def plan(self, clients: int, at: int, seed: int) -> Attendance:
        """See `Participation`."""
        turns = in_order(self._turn(client, at, seed) for client in self._cohort(clients, at, seed))
        return Attendance(turns, self._seconds(turns, at, seed))

    def scale(self, staleness: int) -> float:
        """Updates are merged as they are."""
        return 1.0

    def _cohort(self, clients: int, at: int, seed: int) -> list[int]:
        there: Sequence[int] = pool(self.available, clients, at, seed)
        rng = seeds.stream(seed, "cohort", at)
        if self.draw == "poisson":  # so many of n independent draws succeed, and then every subset is as likely
            size = int(rng.binomial(len(there), self.fraction))
        else:
            size = min(len(there), max(1, round(self.fraction * clients)))
        return [int(there[i]) for i in rng.choice(len(there), size, replace=False)] if size else []

    def _turn(self, client: int, at: int, seed: int) -> Turn:
        if drops(self.dropout, client, at, seed):
            return Turn(client, at - 1, lost=DROPPED)
        if self.pace is None or self.deadline_s is None:
            return Turn(client, at - 1)
        work = min(1.0, self.deadline_s / self.pace.seconds(client, at, seed))
        if work < 1 and self.late == "out":
            return Turn(client, at - 1, lost=LATE)
        return Turn(client, at - 1, work)

    def _seconds(self, turns: Sequence[Turn], at: int, seed: int) -> float | None:
        """The server waits for the slowest; where a deadline is set, no longer than that."""
        if self.pace is None:
            return None
        slowest = max((self.pace.seconds(turn.client, at, seed) for turn in turns), default=0.0)
        if self.deadline_s is None:
            return slowest
        return self.deadline_s if any(turn.lost for turn in turns) else min(slowest, self.deadline_s)
