"""The contract: what happens to an update before it leaves a client, and how the server folds a round into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from fedssl.errors import ConfigError, ProtocolError
from fedssl.participation.base import Participation
from fedssl.parts import Arrays

if TYPE_CHECKING:  # accountants take a second to import, and a plain run needs none
    from fedssl.privacy.ledger import Entry
    from fedssl.privacy.statement import Declared

Scalar = int | float | str | bytes | bool
Told = Mapping[str, Scalar]  # beside the arrays of a message
Ask = Callable[[Mapping[int, Told]], dict[int, Told]]  # questions by client, to the answers of those that answered


@dataclass(frozen=True)
class Planned:
    """A run as it is known before any data is read."""

    clients: int
    rounds: int
    seed: int
    participation: Participation


@dataclass(frozen=True)
class Occasion:
    """One attempt of a round."""

    round: int
    attempt: int  # 1, or more if the round is repeated after a kill: no attempt may draw another one's noise
    clients: Sequence[int]  # whose updates are awaited, sorted; maybe none
    lost: Sequence[int] = ()  # who begin the round, too, and drop out before they send


@dataclass(frozen=True)
class Sender:
    """The client that is about to send an update."""

    client: int
    round: int
    attempt: int
    examples: int
    seed: int  # of the run


@dataclass(frozen=True)
class Memory:
    """What an aggregation knows from earlier rounds; it is part of the server's checkpoint."""

    arrays: Arrays = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a round came to.

    Attributes:
        change: the mean of the clients' changes, float64, by the names of the arrays that were asked for.
        memory: for the next round.
        row: numbers for `metrics.jsonl`. They are seen by whoever runs the server only.
    """

    change: Arrays
    memory: Memory
    row: Mapping[str, float] = field(default_factory=dict)


class Session(Protocol):
    """The server's side of one attempt of a round, in O(model) memory."""

    def told(self, client: int) -> Told:
        """What this client's instruction says besides the job and the round; equal ones share a message."""
        ...

    def add(self, client: int, wire: Arrays) -> None:
        """Fold in what a client has sent; the order does not matter.

        Raises:
            ProtocolError: it is not what was asked for.
        """
        ...

    def finish(self) -> Outcome | None:
        """The round's outcome, once everybody who will has sent; None: too few have, and the round is skipped."""
        ...


class Aggregation(Protocol):
    """How updates become one: a frozen dataclass whose fields are its options."""

    @property
    def each(self) -> bool:
        """Whether strategies see each client's update, as it was trained. Nothing below is called then."""
        ...

    @property
    def private_uploads(self) -> bool:
        """Whether what leaves a client is differentially private of itself."""
        ...

    @property
    def secret_cohorts(self) -> bool:
        """Whether nobody but the server may know who takes part, so that the run's seed must not tell."""
        ...

    def admit(self, plan: Planned) -> None:
        """Refuse a run that is outside of what can be computed or claimed.

        Raises:
            PrivacyError: in one sentence.
        """
        ...

    def begin(self, plan: Planned) -> Memory:
        """What is known before the first round."""
        ...

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """On the client: what leaves it.

        Args:
            change: trained minus received values, float64, of every array that is asked for; 0 where it has no say.
            told: what the session told it.
            sender: who, when and with how many examples.
        """
        ...

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> Session:
        """On the server, before the clients are instructed.

        Args:
            asked: the present values of the arrays that clients send, for names, shapes and types.
            occasion: the round, and who takes part.
            memory: of the round before.
            plan: of the run.
            ask: sends each client a question by the action `query.aggregation` and returns the answers; see
                `Answering`.
        """
        ...

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Bytes of an update of these arrays."""
        ...


@runtime_checkable
class Private(Protocol):
    """An aggregation for whose whole run an epsilon is known, for the unit `client`."""

    def entry(self, plan: Planned, at: int, attempt: int) -> Entry:
        """What an attempt of a round adds to the server's ledger. A round that adds nothing has the count 0."""
        ...

    def budget(self, plan: Planned) -> tuple[float | None, float]:
        """(epsilon, delta) that no round may exceed; None for no limit."""
        ...

    def declaration(self, plan: Planned) -> Declared:
        """Unit, relation, adversary, sampler and what is released, for `privacy.json`."""
        ...

    def remarks(self, plan: Planned, size: int) -> Sequence[str]:
        """Sentences for whoever starts the run.

        Args:
            plan: of the run.
            size: numbers in an update.
        """
        ...


@runtime_checkable
class OwnAccount(Protocol):
    """An aggregation under which every client is private of itself, and keeps a ledger of what it has let go."""

    def turn(self, plan: Planned, at: int, attempt: int) -> Entry:
        """What an attempt of a turn costs the client that takes it."""
        ...

    def assure(self, plan: Planned, told: Told) -> None:
        """On the client, before it trains: refuse to take less noise than the turn is accounted with.

        Raises:
            PrivacyError: the server's words would make it so.
        """
        ...


@runtime_checkable
class Answering(Protocol):
    """An aggregation whose server asks clients before or after they train."""

    def answer(self, question: Told, secrets: Told, client: int) -> tuple[Told, Told]:
        """On the client: the answer, and what to remember of it for the rest of the round (in `Context.state`)."""
        ...

    def sent(self, told: Told, sender: Sender) -> Told:
        """On the client, once its update has left: what to remember from then on.

        `told` is what `send` got: the session's words, and behind `own.` those that the client remembered.
        """
        ...


def refuse_stale(plan: Planned, name: str) -> None:
    """Refuse asynchronous turns to an aggregation that averages changes: they must be from the same model.

    Raises:
        ConfigError: there may be some.
    """
    if plan.participation.max_staleness:
        raise ConfigError(
            f"turns of this participation begin with older models, whose changes aggregation={name} cannot mix: "
            "use participation=uniform or poisson, or aggregation=plain"
        )


def check_wire(wire: Arrays, asked: Mapping[str, np.ndarray], who: str) -> None:
    """Refuse changes that have not exactly the asked names and shapes; their values may be anything.

    Raises:
        ProtocolError: for the first difference.
    """
    odd = sorted(wire.keys() ^ asked.keys()) or [
        key for key, value in wire.items() if value.shape != asked[key].shape or value.dtype.kind not in "biuf"
    ]
    if odd:
        raise ProtocolError(
            f"{who} sent {odd[0]!r} otherwise than it was asked for: it runs another method, encoder, aggregation or "
            "version"
        )


def to_wire(change: Mapping[str, np.ndarray]) -> Arrays:
    """A change in float32, whatever the arrays are; what is too large for it becomes infinite."""
    with np.errstate(over="ignore"):
        return {key: value.astype(np.float32) for key, value in change.items()}


def wire_bytes(asked: Mapping[str, np.ndarray]) -> int:
    """Bytes of an update that `to_wire` has made."""
    return 4 * sum(value.size for value in asked.values())
