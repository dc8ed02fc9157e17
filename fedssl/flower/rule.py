"""What this project's strategies add to Flower's: a client side, and a statement of what they read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fedssl.flower.codec import Memo
from fedssl.parts import Arrays, Layout, Part
from fedssl.workshop import Workshop


@dataclass(frozen=True)
class Own:
    """What a client brings to a round from its earlier ones."""

    arrays: Arrays = field(default_factory=dict)  # last trained values of the parts that the strategy keeps
    memo: Memo = field(default_factory=dict)
    round: int = 0  # the last round in which it trained; 0: never, and then there are no arrays
    client: int = -1  # which one it is


@runtime_checkable
class PartRule(Protocol):
    """A strategy that consumes replies one by one in any order, and says how merged arrays meet a client's own."""

    reads: str  # "mean", of each array over the clients that sent it, or "each", every client's, all arrays
    proximal: float  # how strongly local training is pulled to where it starts; 0: not at all

    @property
    def keeps(self) -> Collection[str]:
        """The parts whose trained values a client keeps for its next `receive`."""
        ...

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]:
        """Who owns which part under this rule, where it differs from what the method says; the configuration wins."""
        ...

    def receive(self, now: Arrays, own: Own, at: int, layout: Layout) -> tuple[Arrays, Memo]:
        """On the client: the values to start from, and what to remember.

        `at` is the round after the one that made the server's values; rounds that merge nothing do not count. So
        `own.round == at - 1` says that this client was among those whose updates they are.
        """
        ...

    def remember(self, start: Arrays, trained: Arrays, memo: Memo, layout: Layout) -> Memo:
        """On the client after training: what to remember of how the merged parts moved."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """A strategy that trains on the server, on public examples."""

    @property
    def student(self) -> Arrays:
        """The arrays of the server's own model that it has trained: they are measured and exported as the merged ones.

        Those that no client receives must be among its attributes, so that a resumed run has them.
        """
        ...

    def prepare(self, workshop: Workshop) -> None:
        """Called once, before a run is begun or resumed."""
        ...

    def begin(self, now: Arrays) -> Arrays:
        """What the first round sends, given the initial values; not called when a run is resumed."""
        ...
