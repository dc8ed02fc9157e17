"""Sections of a configuration that are plain numbers: the federation, what is measured, what may leave a client."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedssl.errors import ConfigError, ProtocolError


@dataclass(frozen=True)
class Federation:
    """Who there is, for how long, and what is forgiven."""

    clients: int = 10
    rounds: int = 40
    tolerate: int | None = 0  # failed or missing clients a round that do not end the run; None: any, the quorum decides
    quorum: int | float = 1  # updates that a round needs, or their share of the clients that it asks
    below_quorum: str = "skip"  # a round with fewer leaves the model as it is; or end, the run
    timeout_s: float = 3600.0  # for the replies of one round
    max_change: float | None = None  # L2 norm: an update that moves the weights further is refused

    def __post_init__(self) -> None:
        if min(self.clients, self.rounds) < 1:
            raise ConfigError(
                f"federation.clients={self.clients} and federation.rounds={self.rounds} must both be at least 1"
            )
        if (self.tolerate or 0) < 0 or not self.timeout_s > 0 or not (self.max_change is None or self.max_change > 0):
            raise ConfigError(
                "federation.tolerate must be at least 0 or null, federation.timeout_s and max_change above 0"
            )
        share = isinstance(self.quorum, float) and 0 < self.quorum < 1
        if not share and not (1 <= self.quorum <= self.clients and self.quorum == int(self.quorum)):
            raise ConfigError(
                f"federation.quorum={self.quorum} updates a round cannot come from {self.clients} clients: "
                "give a number from 1 to federation.clients, or a share below 1 of those asked"
            )
        if self.below_quorum not in ("skip", "end"):
            raise ConfigError(f"federation.below_quorum={self.below_quorum!r} is unknown: use skip or end")

    def needed(self, asked: int) -> int:
        """The updates that a round needs which asks so many clients: at least one."""
        return max(1, math.ceil(self.quorum * asked)) if self.quorum < 1 else int(self.quorum)

    def enough(self, asked: int) -> int:
        """How many of so many clients have to be there for the round to come to something."""
        return max(self.needed(asked), asked - (asked if self.tolerate is None else self.tolerate))

    def skip(self, at: int, updates: int, reason: str = "") -> None:
        """Let a round with fewer updates than the quorum pass, or not; `reason` is given where it is another.

        Raises:
            ProtocolError: such a round ends the run.
        """
        if self.below_quorum == "end":
            if reason:
                raise ProtocolError(f"round {at} ends the run by federation.below_quorum=end: {reason}")
            raise ProtocolError(
                f"round {at} has {updates} updates and federation.quorum={self.quorum}: `fedssl resume` asks "
                "the clients again; or start anew with a lower quorum, more clients a round, or below_quorum=skip"
            )


@dataclass(frozen=True)
class Evaluate:
    """What is measured on labelled data, on the server; labels never reach the training."""

    every: int = 5  # rounds between measurements; 0 measures at the end only
    clients: int = 4  # client encoders measured before the merge (simulation only)
    examples: int = 2000  # at most, for each of kNN bank, test set and diagnostics during training
    knn_k: int = 20
    final: bool = True  # linear and few-label probes, at the end
    repeats: int = 10  # draws of the few-label probe

    def __post_init__(self) -> None:
        if min(self.every, self.clients) < 0 or min(self.examples, self.knn_k, self.repeats) < 1:
            raise ConfigError("evaluate: every and clients must be at least 0; examples, knn_k, repeats at least 1")


@dataclass(frozen=True)
class Consent:
    """What may leave a client although it holds data of single examples; see `fedssl payload`."""

    allow: tuple[str, ...] = ()  # parts of the model
