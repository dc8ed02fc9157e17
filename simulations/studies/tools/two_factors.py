"""T5's data: grey images of a glyph, which names the class, on stripes, which are the background; views redraw either.

An example is its two factors and a place; an image is drawn when it is looked at. A view draws place, phase and noise
anew, so that its factors are all that two views of an example can share. Its site says how often views keep a factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Data, Shard
from fedssl.errors import ConfigError
from fedssl.method import Examples

GLYPHS = (
    "..#.. ..#.. ##### ..#.. ..#..",
    "#...# .#.#. ..#.. .#.#. #...#",
    "##### #...# #...# #...# #####",
    "##### ..#.. ..#.. ..#.. ..#..",
    "#.... #.... #.... #.... #####",
    "#...# #...# ##### #...# #...#",
    "##### ...#. ..#.. .#... #####",
    "..#.. .#.#. #...# .#.#. ..#..",
)
SIZE = 12  # pixels a side
NOISE = 0.15  # of views, where stripes have the amplitude 0.5 and glyphs are 1 high
SHAPE = (1, SIZE, SIZE)


class Scene(NamedTuple):
    """What a batch of images is drawn from."""

    factors: Tensor  # (B, 2) int64: glyph and stripes
    keep: Tensor  # (B, 2) probability that a view keeps them
    place: Tensor  # (B, 3) in [0, 1): across, down, phase


@dataclass(frozen=True)
class FactorViews:
    """Draws views of two-factor examples: each keeps a factor with its example's probability, or draws it anew."""

    modality: ClassVar[str] = "images"
    reads: ClassVar[str] = "scenes of two factors, as `FactorTable.batch` gives them"
    backgrounds: int = 8

    def views(self, x: Scene, generator: torch.Generator, count: int) -> list[Tensor]:
        """`count` images (B, 1, 12, 12), each with place, phase and noise of its own."""
        return [self._view(x, generator) for _ in range(count)]

    def plain(self, x: Scene) -> Tensor:
        """(B, 1, 12, 12): the example itself, without noise."""
        return self._draw(x.factors, x.place)

    def _view(self, x: Scene, generator: torch.Generator) -> Tensor:
        b = len(x.factors)
        u = torch.rand(b, 7, generator=generator)
        fresh = (u[:, :2] * torch.tensor([len(GLYPHS), self.backgrounds])).long()
        factors = torch.where(u[:, 2:4] < x.keep, x.factors, fresh)
        return self._draw(factors, u[:, 4:]) + NOISE * torch.randn(b, *SHAPE, generator=generator)

    def _draw(self, factors: Tensor, place: Tensor) -> Tensor:
        grid = torch.arange(SIZE)
        corner = 2 + (place[:, :2] * 4).long()  # (B, 2)
        row, column = (grid - corner[:, i : i + 1] for i in (1, 0))  # (B, 12), of the glyph
        inside = ((row >= 0) & (row < 5))[:, :, None] & ((column >= 0) & (column < 5))[:, None]
        glyph = _glyphs()[factors[:, 0, None, None], row.clamp(0, 4)[:, :, None], column.clamp(0, 4)[:, None]]
        angle = math.pi * factors[:, 1] / self.backgrounds
        along = angle.cos()[:, None, None] * grid + angle.sin()[:, None, None] * grid[:, None]
        stripes = 0.3 * torch.cos(2 * math.pi * (0.25 * along + place[:, 2, None, None]))
        return (stripes + glyph * inside).unsqueeze(1)


def _glyphs() -> Tensor:
    rows = [[[float(c == "#") for c in row] for row in glyph.split()] for glyph in GLYPHS]
    return torch.tensor(rows)


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Examples of two factors; targets are the glyphs, groups the sites."""

    factors: Tensor  # (N, 2)
    place: Tensor  # (N, 3)
    groups: NDArray[np.int64]  # (N,), sites
    keep: Tensor  # (sites, 2)
    shape: tuple[int, ...] = SHAPE

    def __len__(self) -> int:
        return len(self.factors)

    @property
    def targets(self) -> NDArray[np.int64]:
        """The glyphs (N,)."""
        return self.factors[:, 0].numpy()

    @property
    def backgrounds(self) -> NDArray[np.int64]:
        """The stripes (N,)."""
        return self.factors[:, 1].numpy()

    @property
    def device(self) -> torch.device:
        """The CPU: images this small are drawn there."""
        return self.factors.device

    def batch(self, index: Tensor) -> Scene:
        """The scenes at (B,) positions."""
        return Scene(self.factors[index], self.keep[torch.from_numpy(self.groups)[index]], self.place[index])

    def to(self, device: str | torch.device) -> FactorTable:
        """The same table, on the CPU.

        Raises:
            ConfigError: another device is asked for.
        """
        if torch.device(device).type != "cpu":
            raise ConfigError(f"two-factor examples are drawn on the CPU, not on {device}: pass device=cpu")
        return self

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """A client's examples."""
        return Shard.of(self, rows)


@dataclass(frozen=True)
class TwoFactors:
    """x = (s_y, b): 8 glyphs and 8 kinds of stripes, independent and uniform, at sites that augment differently.

    Args:
        train, test: number of examples.
        keep_signal: probability that a view keeps the glyph, one for each site.
        keep_background: likewise for the stripes.
        seed: of the data set, not of the run.
        augment: how views are drawn.

    Raises:
        ConfigError: probabilities that do not fit.
    """

    train: int = 2000
    test: int = 1000
    keep_signal: tuple[float, ...] = (1.0,)
    keep_background: tuple[float, ...] = (1.0,)
    seed: int = 0
    augment: FactorViews = field(default_factory=FactorViews)

    def __post_init__(self) -> None:
        keep = (*self.keep_signal, *self.keep_background)
        if len(self.keep_signal) != len(self.keep_background) or not all(0 <= k <= 1 for k in keep):
            raise ConfigError(
                f"keep_signal is {self.keep_signal} and keep_background {self.keep_background}, but each site has a "
                "probability of either; give as many numbers from 0 to 1 for both."
            )

    def load(self) -> Data:
        """Draws the factors; equal fields give equal examples."""
        rng = np.random.default_rng(self.seed)
        keep = torch.tensor([self.keep_signal, self.keep_background]).T.contiguous()
        train, test = (self._part(n, keep, rng) for n in (self.train, self.test))
        return Data(train, test, tuple(f"glyph {k}" for k in range(len(GLYPHS))))

    def _part(self, n: int, keep: Tensor, rng: np.random.Generator) -> FactorTable:
        factors = np.stack(
            [rng.permutation(np.arange(n) % size) for size in (len(GLYPHS), self.augment.backgrounds)], 1
        )
        place = torch.from_numpy(rng.random((n, 3), dtype=np.float32))
        groups = rng.permutation(np.arange(n) % len(keep)).astype(np.int64)
        return FactorTable(torch.from_numpy(factors.astype(np.int64)), place, groups, keep)

    @staticmethod
    def options(signal: Sequence[float], background: Sequence[float], train: int) -> list[str]:
        """What makes a run read this data: it has no yaml, because only a study wants it."""
        node = (
            f"_target_: {__name__}.TwoFactors, train: {train}, test: 1000, seed: 0, "
            f"keep_signal: {[float(v) for v in signal]}, keep_background: {[float(v) for v in background]}, "
            f"augment: {{_target_: {__name__}.FactorViews, backgrounds: 8}}"
        )
        return ["data=digits", "~data.test_fraction", "~data.augment", f"++data={{{node}}}", "device=cpu"]
