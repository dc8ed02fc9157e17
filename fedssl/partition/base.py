"""What a partition is: a frozen dataclass that splits whatever has a length, labels and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError

Indices = NDArray[np.int64]
Labels = NDArray[Any]  # (n,) integers, or names for `natural`
Split = Callable[[Any, int, np.random.Generator], list[Indices]]  # such as `iid`: (targets or n, clients, rng)


class Splittable(Protocol):
    """What a partitioner reads of a data set."""

    @property
    def targets(self) -> NDArray[np.int64] | None: ...
    @property
    def groups(self) -> Labels | None: ...
    def __len__(self) -> int: ...


@runtime_checkable
class Partition(Protocol):
    """A configured way to split: a frozen dataclass whose fields are its hyper-parameters."""

    @property
    def uses_labels(self) -> bool:
        """Whether the split depends on the labels."""
        ...

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> list[Indices]: ...


def targets_of(data: Splittable, name: str) -> NDArray[np.int64]:
    """The labels that the partition `name` needs.

    Raises:
        ConfigError: there are none.
    """
    if data.targets is None:
        raise ConfigError(f"The {name} partition needs labels but this data set has none; use partition=iid.")
    return data.targets
