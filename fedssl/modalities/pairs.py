"""Two modalities of one example, such as spoken and written digits: their views, and one tower for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import Augment, View
from fedssl.modalities.encoders import Conv4

SIDES = ("first", "second")
TOWER = Conv4()


@dataclass(frozen=True, eq=False)
class Side:
    """A view: B examples of one modality, and which tower reads them."""

    x: Any  # what that tower takes, e.g. (B, C, H, W)
    which: str  # first or second

    def __len__(self) -> int:
        return len(self.x)

    def split(self, size: int) -> list[Side]:
        """Pieces of `size` examples, the last one smaller, as `Tensor.split` cuts."""
        return [Side(piece, self.which) for piece in self.x.split(size)]


@dataclass(frozen=True, eq=False)
class Pair:
    """B examples in two modalities, row by row; a modality that a client does not have is None.

    Raises:
        ConfigError: no modality at all, or two of different lengths.
    """

    first: Any | None
    second: Any | None

    def __post_init__(self) -> None:
        lengths = {len(side) for side in self.sides}
        if len(lengths) != 1:
            raise ConfigError(
                f"a pair has modalities of {sorted(lengths) or 'no'} examples, but row i of one belongs to row i of "
                "the other: give both the same rows, or one of them and None"
            )

    @property
    def sides(self) -> tuple[Side, ...]:
        """The modalities that are there, first before second."""
        return tuple(Side(x, which) for x, which in zip((self.first, self.second), SIDES, strict=True) if x is not None)

    def __len__(self) -> int:
        return len(self.sides[0])


def two_modalities(views: Sequence[View]) -> bool:
    """Whether views 0 and 1 go through different towers: a gradient through one of them leaves the other untrained."""
    first, second = views[:2]
    return isinstance(first, Side) and isinstance(second, Side) and first.which != second.which


@dataclass(frozen=True)
class PairViews:
    """Augments each modality in its own way; the two modalities are the two views of an example.

    With both at hand, views 0, 2, .. are of the first and views 1, 3, .. of the second modality: a method with two
    views learns what they share. With one at hand all views are of that one, so a client that lacks the other trains
    its tower by the same loss within its modality.

    Args:
        first, second: how views of each modality are drawn.
    """

    modality: ClassVar[str] = "pairs"
    first: Augment
    second: Augment

    @property
    def reads(self) -> str:
        """What goes in, for people."""
        first, second = (str(getattr(node, "reads", node.modality)) for node in (self.first, self.second))
        return f"fedssl.modalities.pairs.Pair(first, second), either may be None; first: {first}; second: {second}"

    def views(self, x: Pair, generator: torch.Generator, count: int) -> list[Side]:
        """Draws `count` views of every example, of the modalities in turn.

        Args:
            x: B examples.
            generator: the only source of randomness.
            count: number of views.
        """
        sides = [x.sides[i % len(x.sides)] for i in range(count)]
        return [Side(self._of(side.which).views(side.x, generator, 1)[0], side.which) for side in sides]

    def plain(self, x: Pair) -> Pair:
        """Only normalises; `TwoTowers` makes one feature vector of what is there."""
        plain = {side.which: self._of(side.which).plain(side.x) for side in x.sides}
        return Pair(plain.get("first"), plain.get("second"))

    def _of(self, which: str) -> Augment:
        return self.first if which == "first" else self.second


@dataclass(frozen=True)
class TwoTowers:
    """One encoder for each modality, both with features of the same size.

    Of a `Side` the network gives its tower's features (B, dim). Of a `Pair`, as in evaluation, it gives one vector an
    example, (B, dim): the mean of the L2-normalised features of the modalities that are there.

    Args:
        first, second: the encoders.
    """

    modality: ClassVar[str] = "pairs"
    first: Any = TOWER
    second: Any = TOWER

    def make(self, shape: Sequence[Any]) -> tuple[nn.Module, int]:
        """The network for pairs of `shape`, which is that of the first and that of the second, and its `dim`.

        Raises:
            ConfigError: a shape that is not two, or towers whose features differ in size.
        """
        if len(shape) != 2 or not all(isinstance(one, Sequence) for one in shape):
            raise ConfigError(
                f"the examples have the shape {tuple(shape)}, which is not one for each of two towers: "
                "use data of pairs, or another encoder"
            )
        (first, dim), (second, other) = (
            tower.make(tuple(one)) for tower, one in zip((self.first, self.second), shape, strict=True)
        )
        if dim != other:
            raise ConfigError(
                f"encoder.first gives {dim} features and encoder.second {other}, but one head reads both: "
                f"give both the same size, e.g. encoder.second.dim={dim}"
            )
        return _Towers(first, second), dim


class _Towers(nn.Module):
    """Sends each modality through its tower."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Side | Pair) -> Tensor:
        if isinstance(x, Pair):
            return torch.stack([F.normalize(self._features(side), dim=1) for side in x.sides]).mean(0)
        return self._features(x)

    def _features(self, side: Side) -> Tensor:
        features: Tensor = (self.first if side.which == "first" else self.second)(side.x)  # (B, dim)
        return features
