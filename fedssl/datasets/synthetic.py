"""Drawn images: shapes x textures in twenty authors' styles, made from a seed, of any size and number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedssl.datasets.base import Data, Dataset
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

Array = NDArray[Any]  # float32
Drawing = tuple[str, Callable[[Array, Array], Array]]

VIEWS = ImageViews(crop=(0.4, 1.0))
AUTHORS = 20
BLOCK = 2048  # images drawn at a time, bounds the memory
SHAPES: tuple[Drawing, ...] = (  # negative inside, about the distance outside; within a radius of 1
    ("disc", lambda u, v: np.hypot(u, v) - 0.95),
    ("square", lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8),
    ("triangle", lambda u, v: np.maximum(-v - 0.55, 0.5 * v + 0.866 * np.abs(u) - 0.5)),
    ("ring", lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.25),
    ("cross", lambda u, v: np.maximum(np.fmax(np.abs(u), np.abs(v)) - 0.95, np.fmin(np.abs(u), np.abs(v)) - 0.28)),
)
TEXTURES: tuple[Drawing, ...] = (  # of angles in radians, value in [-1, 1]
    ("plain", lambda u, v: np.zeros_like(u)),
    ("stripes", lambda u, v: np.sin(u)),
    ("checks", lambda u, v: np.clip(3 * np.sin(u) * np.sin(v), -1, 1)),
    ("waves", lambda u, v: np.sin(np.hypot(u, v))),
)


@dataclass(frozen=True)
class Synthetic:
    """Class k draws shape k % 5 with texture k % 4, at a random place, size, angle and shade.

    An author is a palette and a texture width: the groups for `natural` partitions. Both parts share the authors.

    Args:
        train, test: number of images.
        classes: 2 to 20; the first five already need the shape, more need the texture as well.
        size: side in pixels, at least 8.
        channels: 1 or 3.
        seed: of the data set, not of the run.
        augment: how views are drawn.

    Raises:
        ConfigError: a number out of range.
    """

    train: int = 2000
    test: int = 500
    classes: int = 10
    size: int = 32
    channels: int = 3
    seed: int = 0
    augment: ImageViews = VIEWS

    def __post_init__(self) -> None:
        most = len(SHAPES) * len(TEXTURES)
        if not 2 <= self.classes <= most:
            raise ConfigError(
                f"Synthetic data has 2 to {most} classes, not {self.classes}; choose classes in this range."
            )
        if min(self.train, self.test) < 1 or self.size < 8 or self.channels not in (1, 3):
            raise ConfigError(
                f"Synthetic data of {self.train} + {self.test} images, size {self.size}, {self.channels} channels "
                "cannot be drawn; use at least 1 image each, size of at least 8, and 1 or 3 channels."
            )
        if self.channels != self.augment.channels:
            raise ConfigError(
                f"data.channels is {self.channels} but data.augment.mean has {self.augment.channels} numbers; "
                "give one mean per channel."
            )

    def load(self) -> Data:
        """Draws both parts; equal fields give equal images."""
        rng = np.random.default_rng(self.seed)
        palettes = rng.uniform(0.0, 1.0, (AUTHORS, 2, 3)).astype(np.float32)
        palettes[:, 0] *= 0.45  # paper: dark
        palettes[:, 1] = 0.5 + 0.5 * palettes[:, 1]  # ink: light
        flip = rng.permutation(AUTHORS) < AUTHORS // 2
        palettes[flip] = palettes[flip, ::-1]
        widths = rng.uniform(0.8, 1.25, AUTHORS).astype(np.float32)
        train, test = (self._draw(n, palettes, widths, rng) for n in (self.train, self.test))
        names = tuple(f"{TEXTURES[k % len(TEXTURES)][0]} {SHAPES[k % len(SHAPES)][0]}" for k in range(self.classes))
        return Data(train, test, names)

    def _draw(self, n: int, palettes: Array, widths: Array, rng: np.random.Generator) -> Dataset:
        targets = rng.permutation(np.arange(n) % self.classes).astype(np.int64)
        authors = rng.integers(0, AUTHORS, n)
        images = np.empty((n, self.channels, self.size, self.size), np.uint8)
        for start in range(0, n, BLOCK):
            rows = slice(start, start + BLOCK)
            author = authors[rows]
            images[rows] = self._block(targets[rows], palettes[author], widths[author], rng)
        return Dataset(torch.from_numpy(images), targets, authors.astype(np.int64))

    def _block(
        self, targets: NDArray[np.int64], palette: Array, width: Array, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """(b, C, size, size) from classes (b,), palettes (b, 2, 3) and texture widths (b,)."""
        b = len(targets)
        radius, angle = rng.uniform(0.45, 0.75, b), rng.uniform(-0.35, 0.35, b)
        x0, y0 = rng.uniform(-1, 1, (2, b)) * (0.95 - radius)
        phase = rng.uniform(0, 2 * np.pi, (2, b))
        grid = ((2 * np.arange(self.size) + 1) / self.size - 1).astype(np.float32)
        x, y = grid[None, None, :] - _column(x0), grid[None, :, None] - _column(y0)
        cos, sin = _column(np.cos(angle) / radius), _column(np.sin(angle) / radius)
        u, v = cos * x + sin * y, cos * y - sin * x
        waves = _column(width * 9)
        texture_u, texture_v = u * waves + _column(phase[0]), v * waves + _column(phase[1])
        edge, texture = np.empty_like(u), np.empty_like(u)
        for which, (_, shape) in enumerate(SHAPES):
            rows = targets % len(SHAPES) == which
            edge[rows] = shape(u[rows], v[rows])
        for which, (_, pattern) in enumerate(TEXTURES):
            rows = targets % len(TEXTURES) == which
            texture[rows] = pattern(texture_u[rows], texture_v[rows])
        ink = np.clip(0.5 - edge * _column(radius) * self.size / 2, 0, 1) * (0.75 + 0.25 * texture)
        shade = palette + rng.normal(0, 0.06, palette.shape).astype(np.float32)
        if self.channels == 1:
            shade = shade.mean(2, keepdims=True)
        paper, pen = shade[:, 0, :, None, None], shade[:, 1, :, None, None]
        image = rng.standard_normal((b, self.channels, self.size, self.size), dtype=np.float32) * np.float32(0.04)
        image += paper + ink[:, None] * (pen - paper)
        pixels: NDArray[np.uint8] = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        return pixels


def _column(values: Array) -> Array:
    return values.astype(np.float32)[:, None, None]
