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

    Attributes:
        weighting: `examples` weighs a client by its number of examples, `uniform` counts each client once.
        proximal: mu of FedProx (Li et al. 2020, https://arxiv.org/abs/1812.06127), which adds
            `(mu / 2) |w - w_server|^2` over the merged parameters to the loss of every client; its authors try 0.001
            to 1. 0 is FedAvg.
    """

    weighting: str = "examples"
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if self.proximal < 0:
            raise ConfigError(f"strategy.proximal={self.proximal} would push clients away: give 0 or more")
        if self.weighting not in ("examples", "uniform"):
            raise ConfigError(f"strategy.weighting={self.weighting!r} is unknown: use examples or uniform")

    def weigh(self, update: Update, part: str) -> float:
        """Examples, or 1."""
        return update.weight if self.weighting == "examples" else 1.0

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean as it is."""
        return updates[0].arrays
