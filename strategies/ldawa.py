"""L-DAWA: each client counts, array by array, by the angle between its weights and the server's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedssl.errors import ConfigError
from fedssl.parts import Arrays
from strategies import rules
from strategies.base import PartStrategy, Update


@dataclass
class LDawa(PartStrategy):
    """Layer-wise divergence-aware weight aggregation (Rehman et al. 2023, https://arxiv.org/abs/2307.07393).

    `w_l <- sum_k c_k cos(w_kl, w_l) w_kl`, after some first rounds of the plain mean. As in the paper and its code the
    cosines are not normalised, so the norm of every array falls by its mean cosine each round. Behind a normalisation
    layer that does nothing; elsewhere it shrinks the function, and `normalise=true` guards against it.

    Attributes:
        weighting: c_k: `uniform` (1 / K, the paper's L-DAWA) or `examples` (its mix with FedAvg).
        warmup: first rounds with the plain weighted mean.
        normalise: divide by the sum of the factors, which makes the mean convex.
    """

    reads: ClassVar[Literal["mean", "each"]] = "each"
    weighting: str = "uniform"
    warmup: int = 3
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.weighting not in ("uniform", "examples"):
            raise ConfigError(f"strategy.weighting={self.weighting!r} is unknown: use uniform or examples")
        if self.warmup < 0:
            raise ConfigError(f"strategy.warmup={self.warmup} is a number of rounds: give 0 or more")

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The plain mean in the first rounds, then the layer-wise one."""
        arrays = [update.arrays for update in updates]
        weights = [update.weight if self.weighting == "examples" else 1.0 for update in updates]
        if self._at <= self.warmup:
            return rules.weighted_mean(arrays, weights)
        return rules.layerwise(now, arrays, weights, self.normalise)
