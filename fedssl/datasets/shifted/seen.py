"""Examples as clients see them: a table whose examples pass through a client's own fixed transformation when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Groups, Labels, Shard, Table
from fedssl.datasets.shifted.optics import Optics
from fedssl.method import Examples


@dataclass(frozen=True, eq=False)
class Seen:
    """A table of images or time series through the eyes of clients; evaluation and training read it like any other.

    Attributes:
        data: the examples as they are.
        eyes: (n,) the client through whose eyes each example is seen.
        optics: how each client sees.

    Raises:
        ConfigError: examples that cannot be seen so.
    """

    data: Table
    eyes: Tensor
    optics: Optics

    @classmethod
    def by(cls, data: Table, client: int, optics: Optics) -> Seen:
        """All examples as one client sees them."""
        return cls(data, torch.full((1,), client, device=data.device).expand(len(data)), optics)

    @classmethod
    def by_owners(cls, data: Table, owner: NDArray[np.int64], optics: Optics) -> Seen:
        """Each example as the client that holds it sees it: the union of what the clients see."""
        return cls(data, torch.from_numpy(owner).to(data.device), optics)

    @property
    def targets(self) -> Labels | None:
        """Those of the examples."""
        return self.data.targets

    @property
    def groups(self) -> Groups | None:
        """Those of the examples."""
        return self.data.groups

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of one example."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> Tensor:
        """The examples at (B,) int64 positions, as they are seen."""
        at = index.to(self.device)
        return self.optics(self.data.batch(at), self.eyes[at], at)

    def to(self, device: str | torch.device) -> Seen:
        """The same on `device`."""
        return Seen(self.data.to(device), self.eyes.to(device), self.optics.to(device))

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """These rows, whoever the client is: `eyes` says how they are seen."""
        return Shard.of(self, rows)
