"""What aggregations behind masks have in common: a client's side of a round, and the server's."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedssl.aggregation.base import Ask, Memory, Occasion, Outcome, Planned, Sender, Session, Told
from fedssl.errors import ConfigError, ProtocolError
from fedssl.parts import Arrays
from fedssl.privacy.secagg import collector, conversation
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.graph import Graph
from fedssl.privacy.secagg.participant import Advert, graph_of
from fedssl.privacy.secagg.participant import Session as Agreed

VECTOR = "masked"  # the one array that a client sends


@dataclass(frozen=True)
class Hidden(ABC):
    """The server learns the mean of a round's changes, each client counted once, and nothing else of any of them.

    A client's change of the model, in whole steps of a grid, is hidden by masks that cancel in the sum (Bonawitz et
    al. 2017, https://eprint.iacr.org/2017/281), among many clients only by masks with some of them (Bell et al. 2020,
    https://eprint.iacr.org/2020/704).

    Attributes:
        threshold: share of a round's clients that must not drop out, above 1/2; fewer reveal nothing, and the round is
            skipped.
        colluding: share of a round's clients that may show the server all they know; with it and the threshold the
            number of neighbours is chosen that each client has, see `graph.sizes`.
        bits: of a number on the wire, 32 or 64.
    """

    threshold: float = 0.7
    colluding: float = 0.2
    bits: int = 32
    each: ClassVar[bool] = False
    private_uploads: ClassVar[bool] = False  # one vector alone says nothing, yet a sum may say all
    counters: ClassVar[bool]  # whether whole numbers are averaged; else the server keeps its own
    secret_cohorts: ClassVar[bool] = False  # clients exchange keys, so they know each other

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise ConfigError(
                f"aggregation.threshold={self.threshold} is refused, since two halves of the clients could be told "
                "different survivors: give a share above 0.5, at most 1"
            )
        if not 0 <= self.colluding < 0.5:
            raise ConfigError(
                f"aggregation.colluding={self.colluding} is refused, since half of the clients can open every mask "
                "with the server: give a share of at least 0, below 0.5"
            )
        if self.bits not in (32, 64):
            raise ConfigError(f"aggregation.bits={self.bits} is no size of a number on the wire: use 32 or 64")

    @abstractmethod
    def grid(self, clients: int, size: int) -> FixedPoint:
        """The grid for a sum over so many clients of vectors of this size."""

    @abstractmethod
    def encode(self, values: np.ndarray, clients: int, sender: Sender) -> np.ndarray:
        """(d,) uint32 or uint64: a client's change in float64 as residues of that grid."""

    def fewest(self, clients: int) -> int:
        """How many of so many clients must survive.

        Raises:
            ConfigError: the sum over one client is that client's vector.
        """
        if clients < 2:
            raise ConfigError(
                f"a round has {clients} client, and the sum over one hides nothing: let more take part, or set "
                "federation.quorum=2 to skip such rounds"
            )
        return max(2, clients // 2 + 1, math.ceil(self.threshold * clients - 1e-9))

    def admit(self, plan: Planned) -> None:
        """Changes from different models cannot be added, and one client cannot hide.

        Raises:
            ConfigError: the participation is asynchronous, or there is one client.
        """
        self.fewest(plan.clients)
        if plan.participation.max_staleness:
            raise ConfigError(
                "turns of this participation begin with older models, whose changes cannot be added behind masks: use "
                "participation=uniform, poisson or stragglers, or aggregation=plain"
            )

    def begin(self, plan: Planned) -> Memory:
        """Nothing."""
        return Memory()

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """On the client: its masked vector.

        Raises:
            ProtocolError: it did not take part in the exchange of keys, refuses what it is told, or its change does
                not fit the grid.
        """
        if "clients" not in told:
            raise ProtocolError(
                f"client {sender.client} exchanged no keys before this round, so it has nothing to hide its update "
                "behind: it takes part again in the next round"
            )
        clients = int(told["clients"])
        keys, whole = sorted(change), str(told["whole"]).split("\n")
        step = self.grid(clients, sum(value.size for value in change.values())).step
        # Whole numbers count in steps, so they arrive exactly.
        scale = dict.fromkeys(whole, step if self.counters else 0.0)
        values = [change[key].ravel() * scale.get(key, 1.0) for key in keys]
        residues = self.encode(np.concatenate(values), clients, sender)
        return {VECTOR: conversation.mask(residues, told, sender.client)}

    def sent(self, told: Told, sender: Sender) -> Told:
        """On the client: see `conversation.masked`."""
        return conversation.masked(told, sender.client)

    def answer(self, question: Told, secrets: Told, client: int) -> tuple[Told, Told]:
        """On the client: see `conversation.answer`."""
        return conversation.answer(question, secrets, client)

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> Session:
        """On the server: let the clients exchange keys and shares.

        Raises:
            TooFewError: fewer clients than the threshold answer.
        """
        if not occasion.clients:
            return _Nobody()
        clients = sorted({*occasion.clients, *occasion.lost})
        # A repeated round is another session all the same.
        name = f"{plan.seed} {occasion.round} {occasion.attempt} ".encode() + os.urandom(16)
        agreed = Agreed(name, self.fewest(len(clients)), math.ceil(self.colluding * len(clients) - 1e-9))
        new = _Round(self, asked, agreed, clients, ask)
        new.exchange()
        return new

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Bytes of the masked vector."""
        return self.bits // 8 * sum(value.size for value in asked.values())


class _Nobody:
    """A round that nobody was asked for."""

    def told(self, client: int) -> Told:
        return {}

    def add(self, client: int, wire: Arrays) -> None:
        raise ProtocolError(f"client {client} sent an update that it was not asked for: it is refused")

    def finish(self) -> None:
        return None


@dataclass
class _Round:
    options: Hidden
    asked: Arrays
    agreed: Agreed
    clients: Sequence[int]
    ask: Ask
    roster: dict[int, Advert] = field(default_factory=dict)
    letters: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by recipient, then sender
    survivors: list[int] = field(default_factory=list)
    graph: Graph = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(value.size for value in self.asked.values())
        self.total = np.zeros(self.size, f"u{self.options.bits // 8}")

    def exchange(self) -> None:
        """Steps 1 and 2."""
        keys = self.ask({client: {"step": "advertise"} for client in self.clients})
        self.roster = {client: conversation.advert_of(said) for client, said in sorted(keys.items())}
        collector.enough(self.roster, self.agreed, "sent their keys")
        self.graph = graph_of(self.agreed, self.roster)
        words = {
            "step": "share",
            **conversation.session_words(self.agreed),
            **conversation.roster_words(self.roster),
        }
        sent = self.ask({client: words for client in self.roster})
        collector.enough(sent, self.agreed, "shared their secrets")
        letters = {client: conversation.of_client("letter", said) for client, said in sorted(sent.items())}
        self.letters = collector.deliver(self.graph, letters)

    def told(self, client: int) -> Told:
        """The letters to a client that has sent its own, and what the grid depends on."""
        if client not in self.letters:
            return {}
        whole = "\n".join(key for key, value in self.asked.items() if not np.issubdtype(value.dtype, np.floating))
        return {
            "clients": len(self.clients),
            "whole": whole,
            **conversation.by_client("letter", self.letters[client]),
        }

    def add(self, client: int, wire: Arrays) -> None:
        """Step 3, as the vectors come."""
        vector = wire.get(VECTOR)
        if (
            client not in self.letters
            or vector is None
            or (vector.shape, vector.dtype)
            != (
                self.total.shape,
                self.total.dtype,
            )
        ):
            raise ProtocolError(
                f"client {client} sent no vector of {self.size} numbers of {self.options.bits} bits: it has another "
                "model or other options"
            )
        self.total += vector
        self.survivors.append(client)

    def finish(self) -> Outcome:
        """Step 4, and the mean.

        Raises:
            TooFewError: fewer clients than the threshold are left.
            ProtocolError: one answers wrongly.
        """
        collector.enough(self.survivors, self.agreed, "sent their masked vectors")
        collector.tied(self.graph, self.survivors)
        question = {"step": "reveal", "survivors": conversation.listed(self.survivors)}
        answers = self.ask({client: question for client in self.survivors})
        reveals = {client: conversation.reveal_of(said) for client, said in answers.items()}
        members = self.letters.keys()
        plain = collector.unmask(self.agreed, self.roster, self.graph, members, self.total, self.survivors, reveals)
        grid = self.options.grid(len(self.clients), self.size)
        mean, change, place = grid.mean(plain, len(self.survivors)), {}, 0
        counted = 1 / grid.step if self.options.counters else 0.0
        for key in sorted(self.asked):
            value = self.asked[key]
            part = mean[place : place + value.size].reshape(value.shape)
            change[key] = part if np.issubdtype(value.dtype, np.floating) else part * counted
            place += value.size
        return Outcome(change, Memory())
