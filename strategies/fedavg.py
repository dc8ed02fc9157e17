"""Federated averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedssl.errors import ConfigError
from fedssl.parts import Arrays
from strategies.base import PartStrategy, Update


@dataclass
class FedAvg(PartStrategy):
    """The weighted mean of the clients' parts (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, algorithm 1).

    `weighting=examples` weighs a client by its number of examples, `uniform` counts each client once.
    """

    weighting: str = "examples"

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            raise ConfigError(f"strategy.weighting={self.weighting!r} is unknown: use examples or uniform")

    def weigh(self, update: Update) -> float:
        """Examples, or 1."""
        return update.weight if self.weighting == "examples" else 1.0

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean as it is."""
        return updates[0].arrays
