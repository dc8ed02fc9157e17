"""Buffered asynchronous rounds: clients train at their own pace, and the server merges every few updates."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.participation.base import (
    DROPPED,
    STALE,
    Attendance,
    Availability,
    Pace,
    Turn,
    check_dropout,
    check_scale,
    drops,
    in_order,
    pool,
    scale,
)
from fedssl.participation.pace import Lognormal


@dataclass(frozen=True)
class Buffered:
    """FedBuff (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639, algorithm 1).

    A number of clients is always at work. One that is done hands in the difference that it made to the model it began
    with, another one drawn at random begins from the present model, and when `buffer` differences are in, the server
    merges them: one round. Between two merges a client takes part once, and nothing else decides who is done when than
    the clients' pace, so the whole schedule is known from the seed. A round in which nobody is left at work is merged
    with the differences that are in; if there are none, it is skipped.

    Attributes:
        concurrency: clients at work at the same time; all, if they are fewer.
        buffer: differences a merge.
        max_staleness: a turn that the server has left further behind is stopped, and its work is lost.
        rate: of the server: differences are multiplied by rate / (1 + staleness)^discount.
        discount: 0.5 is the paper's 1 / sqrt(1 + staleness); 0 makes no difference between old and new.
        available: which clients can begin a turn; null: all, always.
        pace: how long a turn takes.
        dropout: probability that a client fails during its turn and its difference never comes.
    """

    concurrency: int = 6
    buffer: int = 3
    max_staleness: int = 10
    rate: float = 1.0
    discount: float = 0.5
    available: Availability | None = None
    pace: Pace = field(default_factory=Lognormal)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.concurrency, self.buffer) < 1 or self.max_staleness < 0:
            raise ConfigError(
                f"participation.concurrency={self.concurrency}, buffer={self.buffer} and max_staleness="
                f"{self.max_staleness} are numbers of clients, updates and rounds: give at least 1, 1 and 0"
            )
        check_scale(self.rate, self.discount)
        check_dropout(self.dropout)

    def plan(self, clients: int, at: int, seed: int) -> Attendance:
        """See `Participation`; the rounds before are played through once in a process."""
        timeline = _timeline(self, clients, seed)
        while len(timeline.rounds) < at:
            timeline.play()
        return timeline.rounds[at - 1]

    def scale(self, staleness: int) -> float:
        """See `Participation`."""
        return scale(staleness, self.rate, self.discount)


@lru_cache(maxsize=4)
def _timeline(options: Buffered, clients: int, seed: int) -> _Timeline:
    return _Timeline(options, clients, seed)


class _Timeline:
    """The simulated clock of a federation, and the rounds that it has played."""

    def __init__(self, options: Buffered, clients: int, seed: int) -> None:
        self._options, self._clients, self._seed = options, clients, seed
        self.rounds: list[Attendance] = []
        self._now = 0.0
        self._begun = 0  # turns
        self._working: list[tuple[float, int, int]] = []  # a heap of (when it is done, client, start)

    def play(self) -> None:
        """One more round."""
        at, began = len(self.rounds) + 1, self._now
        there = pool(self._options.available, self._clients, at, self._seed)
        turns = {c: Turn(c, s, lost=STALE) for _, c, s in self._working if at - 1 - s > self._options.max_staleness}
        self._working = [work for work in self._working if work[1] not in turns]
        heapq.heapify(self._working)
        missing = self._options.buffer
        while missing:
            self._begin(there, at, turns)
            if not self._working:
                break
            self._now, client, start = heapq.heappop(self._working)
            lost = DROPPED if drops(self._options.dropout, client, start + 1, self._seed) else ""
            turns[client] = Turn(client, start, lost=lost)
            missing -= not lost
        self.rounds.append(Attendance(in_order(turns.values()), self._now - began))

    def _begin(self, there: Sequence[int], at: int, turns: dict[int, Turn]) -> None:
        """Fill the free places with clients that are neither at work nor have had their turn in this round."""
        out = {client for _, client, _ in self._working} | turns.keys()
        while len(self._working) < self._options.concurrency:
            self._begun += 1
            client = _draw(there, out, self._seed, self._begun)
            if client is None:
                break
            out.add(client)
            done = self._now + self._options.pace.seconds(client, at, self._seed)
            heapq.heappush(self._working, (done, client, at - 1))


def _draw(there: Sequence[int], out: set[int], seed: int, turn: int) -> int | None:
    """One of those that are there and not out, each as likely; in time that does not grow with the federation."""
    rng = seeds.stream(seed, "cohort", "turn", turn)
    if len(there) > 4 * len(out):  # then at most one try in four fails
        while (client := int(there[int(rng.integers(len(there)))])) in out:
            pass
        return client
    left = [int(client) for client in there if client not in out]
    return left[int(rng.integers(len(left)))] if left else None
