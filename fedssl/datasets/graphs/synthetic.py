"""Drawn graphs: five ways of linking nodes in twenty styles, made from a seed, of any size and number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedssl.datasets.base import Data
from fedssl.datasets.graphs.table import Array, Graphs
from fedssl.errors import ConfigError
from fedssl.modalities.graphs import GraphViews

VIEWS = GraphViews()
STYLES = 20
COLOURS = 4


def _ring(n: int, rng: np.random.Generator) -> Array:
    """One cycle."""
    at = np.arange(n)
    return np.stack((at, (at + 1) % n))


def _tree(n: int, rng: np.random.Generator) -> Array:
    """Each node but the first hangs on a random earlier one."""
    child = np.arange(1, n)
    return np.stack((child, rng.integers(0, child)))


def _grid(n: int, rng: np.random.Generator) -> Array:
    """Rows of about sqrt(n) nodes, one below the other; the last may be shorter."""
    at, width = np.arange(n), max(2, round(math.sqrt(n)))
    along, down = at[:-1][(at[:-1] + 1) % width != 0], at[: n - width]
    return np.stack((np.concatenate((along, down)), np.concatenate((along + 1, down + width))))


def _stars(n: int, rng: np.random.Generator) -> Array:
    """Hubs in a row, each with about five leaves."""
    hubs = max(1, n // 6)
    leaf, hub = np.arange(hubs, n), np.arange(hubs - 1)
    return np.stack((np.concatenate((leaf, hub)), np.concatenate((leaf % hubs, hub + 1))))


def _cliques(n: int, rng: np.random.Generator) -> Array:
    """A chain of groups of four nodes, all linked within the group."""
    at = np.arange(n)
    first, second = np.triu_indices(n, 1)
    within = first // 4 == second // 4
    bridge = at[3 : n - 1 : 4]
    return np.stack((np.concatenate((first[within], bridge)), np.concatenate((second[within], bridge + 1))))


KINDS: tuple[tuple[str, Callable[[int, np.random.Generator], Array]], ...] = (
    ("tree", _tree),
    ("grid", _grid),
    ("cliques", _cliques),
    ("stars", _stars),
    ("ring", _ring),
)


@dataclass(frozen=True)
class SyntheticGraphs:
    """Class k links its nodes as a random tree, a grid, a chain of cliques, a chain of stars, or a ring.

    A style is a size, a share of links that are moved at random, and the frequencies of four colours: the groups for
    `natural` partitions. A node's features are its colour, one-hot, which says nothing of the class. Both parts share
    the styles.

    Args:
        train, test: number of graphs.
        classes: 2 to 5.
        size: mean number of nodes, at least 8; styles have 0.6 to 1.4 of it.
        noise: largest share of links that a style moves, 0 to 1.
        seed: of the data set, not of the run.
        augment: how views are drawn.

    Raises:
        ConfigError: a number out of range.
    """

    train: int = 1000
    test: int = 300
    classes: int = 5
    size: int = 20
    noise: float = 0.2
    seed: int = 0
    augment: GraphViews = VIEWS

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(KINDS):
            raise ConfigError(
                f"Synthetic graphs have 2 to {len(KINDS)} classes, not {self.classes}; choose classes in this range."
            )
        if min(self.train, self.test) < 1 or self.size < 8 or not 0 <= self.noise <= 1:
            raise ConfigError(
                f"Synthetic data of {self.train} + {self.test} graphs, size {self.size} and noise {self.noise} cannot "
                "be drawn; use at least 1 graph each, size of at least 8, and noise between 0 and 1."
            )

    def load(self) -> Data:
        """Draws both parts; equal fields give equal graphs."""
        rng = np.random.default_rng(self.seed)
        sizes = rng.permutation(np.linspace(0.6, 1.4, STYLES)) * self.size
        moved = rng.uniform(0, self.noise, STYLES)
        colours = rng.dirichlet(np.ones(COLOURS), STYLES)
        train, test = (self._draw(n, sizes, moved, colours, rng) for n in (self.train, self.test))
        return Data(train, test, tuple(name for name, _ in KINDS[: self.classes]))

    def _draw(self, n: int, sizes: Array, moved: Array, colours: Array, rng: np.random.Generator) -> Graphs:
        targets = rng.permutation(np.arange(n) % self.classes).astype(np.int64)
        styles = rng.integers(0, STYLES, n)
        nodes = np.rint(sizes[styles] * rng.uniform(0.85, 1.15, n)).astype(np.int64).clip(min=4)
        offsets = np.cumsum(np.append(0, nodes))
        edges = []
        for kind, style, count, first in zip(targets, styles, nodes, offsets, strict=False):
            own = KINDS[kind][1](int(count), rng)
            wild = rng.random(own.shape[1]) < moved[style]
            own[:, wild] = rng.integers(0, count, (2, int(wild.sum())))
            edges.append(first + rng.permutation(count)[own])
        style = np.repeat(styles, nodes)
        colour = (rng.random((len(style), 1)) > colours.cumsum(1)[style, :-1]).sum(1)
        x = np.eye(COLOURS, dtype=np.float32)[colour]
        return Graphs.of(x, np.concatenate(edges, 1), offsets, targets, styles.astype(np.int64))
