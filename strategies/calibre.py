"""Calibre: the tighter a client's clusters, the more its networks count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedssl.errors import ConfigError, ProtocolError
from fedssl.parts import Arrays
from strategies import rules
from strategies.base import PartStrategy, Update

DIVERGENCE = "divergence"  # a scalar that clients of the method of the same name report


@dataclass
class Calibre(PartStrategy):
    """Calibre (Chen, Su & Li 2024, https://arxiv.org/abs/2412.20020), for the method of that name.

    A client that reports the divergence d_k counts `(1 / d_k) / sum_j (1 / d_j)`: the weights sum to 1. (The authors'
    server weighs by that and by examples in one sum without dividing again, so K equal clients move the model by 1 / K
    of their mean step.) A client with fewer examples than clusters reports about 0 and would be the only one to count:
    `floor` bounds that.

    Attributes:
        floor: the least divergence, above 0.
        weighting: `divergence`, or `both`: by examples / d_k.
    """

    needs: ClassVar[tuple[str, ...]] = (DIVERGENCE,)
    floor: float = 0.05
    weighting: str = "divergence"

    def __post_init__(self) -> None:
        if self.weighting not in ("divergence", "both"):
            raise ConfigError(f"strategy.weighting={self.weighting!r} is unknown: use divergence or both")
        if self.floor <= 0:
            raise ConfigError(f"strategy.floor={self.floor} divides by zero: give a divergence above 0")

    def weigh(self, update: Update, part: str) -> float:
        """In inverse proportion to the divergence."""
        if DIVERGENCE not in update.metrics:
            raise ProtocolError(
                f"client {update.client} did not report its divergence, by which Calibre weighs: it runs another app"
            )
        weight = rules.inverse_weight(update.metrics[DIVERGENCE], self.floor)
        return weight * update.weight if self.weighting == "both" else weight

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean by these weights."""
        return updates[0].arrays
