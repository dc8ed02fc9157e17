"""Clients whose data nobody else has: a node's own data set, and what the server works with instead."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.build import build, load
from fedssl.datasets.base import Data, Shard
from fedssl.errors import ConfigError, ProtocolError
from fedssl.method import Examples
from fedssl.partition import Elsewhere, Parts, Splittable

_CPU = torch.device("cpu")
_PLACES = ("path", "root")  # how data sources call where they read


@dataclass(frozen=True)
class Sites:
    """Every client trains on a data set of its own, which its node names (`data-dir`) and nobody else knows.

    The options of `data` say what kind it is. Its path is the server's own data set, on which it only measures; an
    empty one says that it has none.

    Attributes:
        shape: of one example, of the server's data set as of every client's: [channels, height, width] of images,
            [channels, steps] of time series, the shapes of both of pairs.
    """

    shape: Any
    uses_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.shape, list | tuple):
            object.__setattr__(self, "shape", _nested(self.shape))  # a list has no hash

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """Nothing is divided."""
        return Elsewhere(clients)

    def check(self, data: Data, whose: str) -> Data:
        """The data, if its examples have the shape.

        Raises:
            ConfigError: they have another one.
        """
        if _plain(data.train.shape) != _plain(self.shape):
            raise ConfigError(
                f"{whose} examples have the shape {_plain(data.train.shape)} and the run is for "
                f"partition.shape={_plain(self.shape)}: resize them, or run with their shape"
            )
        return data

    @property
    def blank(self) -> Data:
        """What a server has that holds no data: a shape.

        Raises:
            ConfigError: it is none.
        """
        if not (isinstance(self.shape, tuple) and self.shape):
            raise ConfigError(f"partition.shape={self.shape} is no shape of an example: grey images have [1,28,28]")
        return Data(Blank(self.shape), Blank(self.shape), ())


@dataclass(frozen=True, eq=False)
class Blank:
    """A data set without examples; a batch of it is zeros, from which only sizes can be learnt."""

    shape: tuple[Any, ...]
    device: torch.device = _CPU
    targets: None = None
    groups: None = None

    def __len__(self) -> int:
        return 0

    def batch(self, index: Tensor) -> Tensor:
        """(B, ...) zeros.

        Raises:
            ConfigError: an example is no single tensor.
        """
        if not all(isinstance(side, int) for side in self.shape):
            raise ConfigError(f"examples of the shape {self.shape} cannot be made up: give the server a data set")
        return torch.zeros(len(index), *self.shape, device=self.device)

    def to(self, device: str | torch.device) -> Blank:
        """The same elsewhere."""
        return Blank(self.shape, torch.device(device))

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """So many examples that are not there."""
        return Shard.of(self, rows)


def at_place(node: dict[str, Any], place: str) -> dict[str, Any]:
    """The configuration of a data source that reads somewhere else.

    Raises:
        ConfigError: it reads from no single place.
    """
    return {**node, _place(node): place}


def has_place(node: dict[str, Any]) -> bool:
    """Whether a data source is told where to read; an empty path is none."""
    return bool(node.get(_place(node)))


def own_data(node: dict[str, Any], place: str, sites: Sites, device: torch.device) -> Data:
    """A node's own data.

    Args:
        node: the configuration of `data`, whose place is replaced.
        place: the node's `data-dir`.
        sites: gives the shape.
        device: where the examples go.

    Raises:
        ConfigError: there is no such data set in that place, or of another shape.
    """
    data: Data = build(at_place(node, place), "data").load()
    sites.check(data, "this node's")
    return Data(data.train.to(device), data.test.to(device), data.classes)


def everything(data: Data, client: int) -> Examples:
    """All training examples of a node's own data, as those of its client."""
    examples: Examples = data.train.shard(np.arange(len(data.train)), client)
    if not len(examples):
        raise ProtocolError("this node's data set has no training example: put some into its data-dir")
    return examples


def _place(node: dict[str, Any]) -> str:
    source = load(str(node.get("_target_", "")))
    names = [field.name for field in fields(source) if field.name in _PLACES]
    if not names:
        raise ConfigError(
            f"data of {source.__name__} is not read from one place, so a node cannot have its own: use data=folder, "
            "npz, signals_npz, pairs_npz, or another that has a path"
        )
    return names[0]


def _plain(shape: Any) -> Any:
    return json.loads(json.dumps(shape))


def _nested(shape: Any) -> tuple[Any, ...]:
    return tuple(_nested(side) if isinstance(side, list | tuple) else side for side in shape)
