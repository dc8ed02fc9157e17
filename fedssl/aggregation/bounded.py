"""The mean of changes that are shortened to a length: one client cannot carry the model further than the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedssl.aggregation.base import (
    Ask,
    Memory,
    Occasion,
    Outcome,
    Planned,
    Sender,
    Told,
    refuse_stale,
    to_wire,
    wire_bytes,
)
from fedssl.aggregation.plain import MeanSession
from fedssl.errors import ConfigError
from fedssl.parts import Arrays
from fedssl.privacy.clients.flat import clip


@dataclass(frozen=True)
class Bounded:
    """The server shortens every client's change to a length and averages them, each client once. No privacy is claimed.

    A bound on what a client that lies about its training can do in a round, whatever it sends; many rounds add up, and
    a lie within the length of honest changes is not noticed. `ClientDP` bounds in the same way, and adds noise.

    Attributes:
        norm: the largest L2 norm of a change, over all arrays but counters. Honest lengths are `drift` in
            `clients.jsonl` of a run with `aggregation=plain`.
        exact: whether means are the same bits whatever the order of arrival, see `Plain`.

    Raises:
        ConfigError: a norm that is not above 0.

    References:
        Sun et al. 2019, https://arxiv.org/abs/1911.07963
    """

    norm: float = 1.0
    exact: bool = True
    each: ClassVar[bool] = False
    private_uploads: ClassVar[bool] = False
    secret_cohorts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise ConfigError(f"aggregation.norm={self.norm} bounds nothing: give a length above 0, such as 1.0")

    def admit(self, plan: Planned) -> None:
        """Changes must be from the same model, so rounds are synchronous.

        Raises:
            ConfigError: the participation is asynchronous.
        """
        refuse_stale(plan, "bounded")

    def begin(self, plan: Planned) -> Memory:
        """Nothing."""
        return Memory()

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """The change, in fewer bytes; the server shortens it, because it cannot trust a client to."""
        return to_wire(change)

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> _Session:
        """See `Aggregation`."""
        return _Session(MeanSession.begun(asked, self.exact), self.norm)

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Four bytes an entry."""
        return wire_bytes(asked)


@dataclass
class _Session:
    changes: MeanSession
    norm: float
    shortened: int = 0

    def told(self, client: int) -> Told:
        return {}

    def add(self, client: int, wire: Arrays) -> None:
        self.changes.check(client, wire)
        weights = {key: value for key, value in wire.items() if self.changes.asked[key].dtype.kind == "f"}
        shortened, length = clip(weights, self.norm)
        self.shortened += length > self.norm
        self.changes.mean.add({**wire, **shortened}, 1.0)

    def finish(self) -> Outcome | None:
        found = self.changes.finish()
        return None if found is None else replace(found, row={"shortened": self.shortened})
