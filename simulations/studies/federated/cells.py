"""Cells of a design: a method, a strategy, a skew and a number of clients, as options of `fedssl pretrain`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from fedssl.errors import ConfigError

CLASSES = 10  # of the digits
_HELD = re.compile(r"([1-9]\d*) class(?:es)?")


@dataclass(frozen=True)
class Cell:
    """One setting of a federation.

    Attributes:
        method, strategy: as `method=` and `strategy=` name them.
        skew: see `partition`.
        clients: how many, or more where the split needs more to hold every class.
    """

    method: str
    strategy: str
    skew: str
    clients: int

    @property
    def count(self) -> int:
        """The clients that there are."""
        held = _HELD.fullmatch(self.skew)
        return max(self.clients, -(-CLASSES // int(held[1]))) if held else self.clients

    @property
    def options(self) -> tuple[str, ...]:
        """Of `fedssl pretrain`."""
        words = (f"method={self.method}", f"strategy={self.strategy}", f"federation.clients={self.count}")
        return (*words, *partition(self.skew))

    @property
    def who(self) -> str:
        """Method and strategy."""
        return f"{self.method}, {self.strategy}"

    @property
    def where(self) -> str:
        """Skew and clients."""
        return f"{self.skew}, {self.count} clients"


def partition(skew: str) -> tuple[str, ...]:
    """The options of a split: "2 classes" a client, "dirichlet 0.1", or the name of a partition such as "iid".

    Raises:
        ConfigError: a number where none belongs.
    """
    if found := _HELD.fullmatch(skew):
        return "partition=pathological", f"partition.classes_per_client={found[1]}"
    if found := re.fullmatch(r"dirichlet ([\d.e-]+)", skew):
        return "partition=dirichlet", f"partition.alpha={found[1]}"
    if not re.fullmatch(r"[a-z_]+", skew):
        raise ConfigError(
            f"{skew!r} is no split: write 'N classes', 'dirichlet ALPHA' or the name of a partition, such as iid"
        )
    return (f"partition={skew}",)


def star(
    centre: Cell,
    methods: Sequence[str] = (),
    strategies: Sequence[str] = (),
    skews: Sequence[str] = (),
    clients: Sequence[int] = (),
) -> list[Cell]:
    """The centre, and the cells that differ from it on one axis."""
    cells = [centre]
    cells += [replace(centre, method=name) for name in methods]
    cells += [replace(centre, strategy=name) for name in strategies]
    cells += [replace(centre, skew=name) for name in skews]
    cells += [replace(centre, clients=count) for count in clients]
    return list(dict.fromkeys(cells))


def cross(
    methods: Sequence[str], strategies: Sequence[str], skews: Sequence[str], clients: Sequence[int]
) -> list[Cell]:
    """Every combination."""
    return [Cell(*words) for words in product(methods, strategies, skews, clients)]
