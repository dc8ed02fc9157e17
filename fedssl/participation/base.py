"""The contract: a round of the server is a list of turns, known before anybody trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedssl import seeds
from fedssl.errors import ConfigError

DROPPED, LATE, STALE = "dropped", "late", "stale"  # why the update of a turn never comes


@dataclass(frozen=True)
class Turn:
    """One client's part in one round of the server."""

    client: int
    start: int  # it trains from the server's model after round `start`; 0 is the initial model
    work: float = 1.0  # share of its local steps that it does, in [0, 1]
    lost: str = ""  # why its update never comes; its own state then is that of its last finished turn

    def staleness(self, at: int) -> int:
        """How many merges the server has made since the turn began, if it ends in round `at`."""
        return at - 1 - self.start


@dataclass(frozen=True)
class Attendance:
    """Who takes part in a round."""

    turns: tuple[Turn, ...]  # sorted by client; each client at most once
    seconds: float | None = None  # what the round takes on the clients' simulated clock, if they have a pace

    @property
    def arriving(self) -> list[Turn]:
        """The turns whose updates come."""
        return [turn for turn in self.turns if not turn.lost]


class Participation(Protocol):
    """Who takes part when: a frozen dataclass whose fields are its options."""

    @property
    def max_staleness(self) -> int:
        """No turn of any round is staler; the server keeps as many earlier models. 0: rounds are synchronous."""
        ...

    def plan(self, clients: int, at: int, seed: int) -> Attendance:
        """The turns that end in round `at` (1, 2, ...) of so many clients. Pure: it depends on these alone."""
        ...

    def scale(self, staleness: int) -> float:
        """What an update is multiplied by before it is merged."""
        ...


@runtime_checkable
class Availability(Protocol):
    """Which clients can be asked."""

    def available(self, clients: int, at: int, seed: int) -> Sequence[int]:
        """Those of the clients 0 .. clients - 1 that can begin a turn in round `at`, sorted."""
        ...


@runtime_checkable
class Pace(Protocol):
    """How fast the clients are."""

    def seconds(self, client: int, at: int, seed: int) -> float:
        """How long a client needs for all local steps of a turn that begins in round `at`."""
        ...


def pool(available: Availability | None, clients: int, at: int, seed: int) -> Sequence[int]:
    """Who can be asked; without an availability everybody, as a range that holds no list."""
    return range(clients) if available is None else available.available(clients, at, seed)


def drops(dropout: float, client: int, at: int, seed: int) -> bool:
    """Whether a client fails in the turn that it begins in round `at`."""
    return dropout > 0 and bool(seeds.stream(seed, "dropout", client, at).random() < dropout)


def in_order(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Turns sorted by client."""
    return tuple(sorted(turns, key=lambda turn: turn.client))


def check_dropout(dropout: float) -> None:
    """Refuse what is not a probability below 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= dropout < 1:
        raise ConfigError(f"participation.dropout={dropout} is not a probability below 1: give a number in [0, 1)")


def check_scale(rate: float, discount: float) -> None:
    """Refuse rates and discounts that would turn an update round or let old ones grow.

    Raises:
        ConfigError: rate is not positive or discount is negative.
    """
    if not (rate > 0 and discount >= 0):
        raise ConfigError(
            f"participation.rate={rate} and participation.discount={discount} multiply updates by rate / "
            "(1 + staleness)^discount: give a rate above 0 and a discount of at least 0"
        )


def scale(staleness: int, rate: float, discount: float) -> float:
    """rate / (1 + staleness)^discount; the authors of FedBuff take a discount of 1/2."""
    return rate / float((1 + staleness) ** discount)
