"""Orchestra: average the networks, and divide the clients' centroids into global clusters of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedssl.errors import ConfigError
from fedssl.methods.common.clustering import global_centroids
from fedssl.parts import Arrays
from strategies import rules
from strategies.base import PartStrategy, Update

GLOBAL, LOCAL = "centroids.weight", "local_centroids.value"  # arrays of the method of the same name


@dataclass
class Orchestra(PartStrategy):
    """Orchestra (Lubana et al. 2022, https://arxiv.org/abs/2205.11506), for the method of that name.

    The networks are averaged as by FedAvg. The centroids of the clients that came are pooled, each counts once, and the
    global centroids move from where they are by `clustering.global_centroids`. What the server returns as local
    centroids is its own first value, so no client gets another's.

    Attributes:
        steps, lr, momentum: of the global clustering.
        temperature: of its softmax, the method's.
        sharpness: of its Sinkhorn-Knopp assignment.
        weighting: `examples`, or `batches`, by which the authors' code weighs the networks.
    """

    reads: ClassVar[Literal["mean", "each"]] = "each"
    needs: ClassVar[tuple[str, ...]] = ("centroids", "local_centroids")
    steps: int = 500
    lr: float = 0.01
    momentum: float = 0.9
    temperature: float = 0.1
    sharpness: float = 25.0
    weighting: str = "examples"

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "batches"):
            raise ConfigError(f"strategy.weighting={self.weighting!r} is unknown: use examples or batches")
        if self.steps < 0 or min(self.lr, self.temperature, self.sharpness) <= 0 or not 0 <= self.momentum < 1:
            raise ConfigError(
                "strategy: lr, temperature and sharpness must be above 0, steps at least 0 and momentum in [0, 1)"
            )

    def merge(self, now: Arrays, updates: Sequence[Update]) -> Arrays:
        """The mean of the networks and the next global centroids."""
        weights = [self._weight(update) for update in updates]
        merged = {**now, **rules.weighted_mean([update.arrays for update in updates], weights)}
        pooled = np.concatenate([update.arrays[LOCAL] for update in updates])
        merged[GLOBAL] = global_centroids(
            now[GLOBAL],
            pooled,
            steps=self.steps,
            lr=self.lr,
            momentum=self.momentum,
            temperature=self.temperature,
            sharpness=self.sharpness,
        )
        merged[LOCAL] = now[LOCAL]
        return merged

    def _weight(self, update: Update) -> float:
        return update.metrics["steps"] if self.weighting == "batches" else update.weight
