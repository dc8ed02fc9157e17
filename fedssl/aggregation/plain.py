"""Aggregations that claim nothing: every update as it is, or only their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl import tree
from fedssl.aggregation.base import (
    Ask,
    Memory,
    Occasion,
    Outcome,
    Planned,
    Sender,
    Told,
    check_wire,
    refuse_stale,
    to_wire,
    wire_bytes,
)
from fedssl.parts import Arrays
from fedssl.tree import PartialMean


@dataclass(frozen=True)
class Plain:
    """Nothing is clipped or noised, and no privacy is claimed.

    Attributes:
        each: whether every client's update reaches the strategy as it was trained. Otherwise the strategy is given the
            mean of the round's changes, each client counted once, as if one client had sent it: what the private
            aggregations are without clipping and noise. A round without an update is skipped.
        exact: whether means are the same bits whatever the order of arrival. Otherwise they are summed in plain
            float64: half of the memory, less than half of the time (`benchmarks/aggregation.py`).
    """

    each: bool = True
    exact: bool = True
    private_uploads: ClassVar[bool] = False
    secret_cohorts: ClassVar[bool] = False

    def admit(self, plan: Planned) -> None:
        """Their mean is of changes from the same model, so it wants synchronous rounds.

        Raises:
            ConfigError: the participation is asynchronous.
        """
        if not self.each:
            refuse_stale(plan, "mean")

    def begin(self, plan: Planned) -> Memory:
        """Nothing."""
        return Memory()

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """The change, in fewer bytes."""
        return to_wire(change)

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> MeanSession:
        """See `Aggregation`."""
        return MeanSession.begun(asked, self.exact)

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Four bytes an entry."""
        return wire_bytes(asked)


@dataclass
class MeanSession:
    """The running mean of a round's changes, each client once."""

    asked: Arrays
    mean: PartialMean

    @classmethod
    def begun(cls, asked: Arrays, exact: bool) -> MeanSession:
        """Without a change yet."""
        return cls(asked, PartialMean({key: np.zeros(value.shape) for key, value in asked.items()}, exact))

    def told(self, client: int) -> Told:
        """Nothing."""
        return {}

    def add(self, client: int, wire: Arrays) -> None:
        """Add a client's change, if it is what was asked for."""
        self.check(client, wire)
        self.mean.add(wire, 1.0)

    def check(self, client: int, wire: Arrays) -> None:
        """Refuse a change that is not what was asked for."""
        check_wire(wire, self.asked, f"client {client}")
        tree.check_same(wire, self.asked, f"client {client}")

    def finish(self) -> Outcome | None:
        """The mean, if there is one."""
        return Outcome(self.mean.result(), Memory()) if self.mean.count else None
