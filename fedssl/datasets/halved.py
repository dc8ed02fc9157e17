"""A random half of another data set's training examples, for shadow runs of an audit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds
from fedssl.datasets.base import Data
from fedssl.errors import ConfigError


def coins(n: int, seed: int, run: int) -> NDArray[np.bool_]:
    """(n,) which training examples this shadow run has: a fair coin for each, of its own."""
    return np.asarray(seeds.stream(seed, "audit", "shadow", run).random(n) < 0.5)


@dataclass(frozen=True)
class Halved:
    """The source's data with those training examples only that `coins` keeps.

    Args:
        source: any data set.
        seed, run: of the coins.
        augment: how views are drawn, as the source has it.

    Raises:
        ConfigError: a negative seed or run.
    """

    source: Any
    seed: int
    run: int
    augment: Any

    def __post_init__(self) -> None:
        if min(self.seed, self.run) < 0:
            raise ConfigError(f"data.seed={self.seed} and data.run={self.run} name no coins: give both at least 0")

    def load(self) -> Data:
        """Loads the source and leaves out the others."""
        data: Data = self.source.load()
        kept = np.flatnonzero(coins(len(data.train), self.seed, self.run))
        return replace(data, train=data.train.subset(kept))
