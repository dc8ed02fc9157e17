"""Secure aggregation without noise: exact up to a rounding, and no guarantee in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedssl.aggregation.base import Sender
from fedssl.errors import ConfigError
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.hidden import Hidden


@dataclass(frozen=True)
class Secure(Hidden):
    """The mean as it is, up to one step of the grid; what the mean itself says of a client is not bounded.

    Attributes:
        limit: the largest change of one number that can be sent; a larger one is an error, never cut. The step of the
            grid follows from it, the bits and the clients of the round.
    """

    limit: float = 8.0
    counters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.limit < math.inf:
            raise ConfigError(f"aggregation.limit={self.limit} lets nothing through: give a positive number")

    def grid(self, clients: int, size: int) -> FixedPoint:
        """See `Hidden`."""
        return FixedPoint.fit(self.limit, clients, self.bits)

    def encode(self, values: np.ndarray, clients: int, sender: Sender) -> np.ndarray:
        """Rounded at random by the run's seed: rounding hides nothing, so it may be known."""
        return self.grid(clients, values.size).encode(values, rounding(sender))


def rounding(sender: Sender) -> Stream:
    """The random words of a client's attempt at a round, from the run's seed: for rounding, and for simulated noise."""
    return Stream.of(sender.seed, "client", sender.client, "round", sender.round, sender.attempt, "secagg")
