"""From one or several TU data sets to features that one network can read, divided into training and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedssl.datasets.base import Data
from fedssl.datasets.graphs.table import Array, Graphs, degrees
from fedssl.datasets.split import stratified
from fedssl.errors import ConfigError

SPLIT_SEED = 20240229  # of the data, not of the run: every run has the same test set
FEATURES = ("labels", "degrees", "both")


@dataclass(frozen=True, eq=False)
class TuSet:
    """One data set of the collection as its files hold it."""

    name: str
    node_offsets: Array  # (G + 1,)
    edges: Array  # (2, E) in any order
    node_labels: Array | None  # (N, K) whole numbers
    attributes: Array | None  # (N, A) real numbers
    targets: Array | None  # (G,) of any kind of number

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.node_offsets[-1])


@dataclass(frozen=True)
class Choice:
    """What becomes of TU data: the options that all sources of it share.

    Args:
        features: of a node: "labels" (one-hot; the degree where a data set has none), "degrees" (one-hot), or "both".
        degree_cap: degrees from this on are one feature, so a degree takes degree_cap + 1 of them.
        attributes: whether real-valued node attributes are appended.
        test_fraction: share of every class held out, strictly between 0 and 1.

    Raises:
        ConfigError: an unknown word, or a number out of range.
    """

    features: str
    degree_cap: int
    attributes: bool
    test_fraction: float

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ConfigError(f"data.features is {self.features!r}, which is not known; use {', '.join(FEATURES)}.")
        if self.degree_cap < 1:
            raise ConfigError(f"data.degree_cap is {self.degree_cap}, which tells no degrees apart; use at least 1.")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(
                f"data.test_fraction is {self.test_fraction} but both parts need graphs; choose it between 0 and 1."
            )


def names_of(text: str) -> list[str]:
    """The data sets that `A+B` names.

    Raises:
        ConfigError: none, or one twice.
    """
    names = [name.strip() for name in text.split("+")]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"data.name is {text!r}; give one name, or different ones joined by +, such as MUTAG+PTC_MR.")
    return names


def assembled(sets: Sequence[TuSet], choice: Choice) -> Data:
    """One table of all graphs, divided class by class, always in the same way.

    Several data sets become the groups of one. Each gets columns of its own for labels and attributes, since their
    numbers mean different things in each; the columns of degrees are shared. Its classes are its own, too.

    Raises:
        ConfigError: attributes are asked for and there are none, or a class is too small to divide.
    """
    shift = np.cumsum([0, *(part.nodes for part in sets)])
    edges = np.concatenate([part.edges + first for part, first in zip(sets, shift, strict=False)], 1)
    offsets = np.concatenate([part.node_offsets[:-1] + first for part, first in zip(sets, shift, strict=False)])
    targets, classes = _targets(sets)
    sizes = [len(part.node_offsets) - 1 for part in sets]
    groups = None if len(sets) == 1 else np.repeat(np.arange(len(sets)), sizes)
    whole = Graphs.of(_features(sets, choice), edges, np.append(offsets, shift[-1]), targets, groups)
    strata = targets if targets is not None else groups if groups is not None else len(whole)
    train, test = stratified(strata, choice.test_fraction, SPLIT_SEED)
    return Data(whole.subset(train), whole.subset(test), classes)


def _features(sets: Sequence[TuSet], choice: Choice) -> Array:
    """(N, F) float32."""
    if choice.attributes and all(part.attributes is None for part in sets):
        raise ConfigError(
            f"data.attributes is true but {' and '.join(part.name for part in sets)} have none; set it to false."
        )
    blocks: list[list[Array]] = []  # of each data set: its own columns; those of degrees come first and are shared
    common = [np.zeros((part.nodes, 0), np.float32) for part in sets]
    counted = [choice.features != "labels" or part.node_labels is None for part in sets]
    if any(counted):
        common = [_degrees(part, choice.degree_cap, used) for part, used in zip(sets, counted, strict=True)]
    for part in sets:
        own = [np.zeros((part.nodes, 0), np.float32)]
        if part.node_labels is not None and choice.features != "degrees":
            own += [_one_hot(column) for column in part.node_labels.T]
        if part.attributes is not None and choice.attributes:
            own.append(part.attributes.astype(np.float32))
        blocks.append(own)
    private = [np.concatenate(own, 1) for own in blocks]
    width = [block.shape[1] for block in private]
    out = np.zeros((sum(part.nodes for part in sets), common[0].shape[1] + sum(width)), np.float32)
    row, column = 0, common[0].shape[1]
    for shared, block in zip(common, private, strict=True):
        rows = slice(row, row + len(block))
        out[rows, : shared.shape[1]] = shared
        out[rows, column : column + block.shape[1]] = block
        row, column = rows.stop, column + block.shape[1]
    return out


def _degrees(part: TuSet, cap: int, used: bool) -> Array:
    """(N, cap + 1) one-hot, all 0 where not used."""
    hot: Array = np.eye(cap + 1, dtype=np.float32)[degrees(part.edges, part.nodes).clip(max=cap)]
    return hot if used else np.zeros_like(hot)


def _one_hot(column: Array) -> Array:
    """(N, L) from (N,) whole numbers, L different ones."""
    values, number = np.unique(column, return_inverse=True)
    hot: Array = np.eye(len(values), dtype=np.float32)[number]
    return hot


def _targets(sets: Sequence[TuSet]) -> tuple[Array | None, tuple[str, ...]]:
    """(G,) int64 over all sets, and the names of the classes; none unless every set has labels."""
    numbers: list[Array] = []
    names: list[str] = []
    for part in sets:
        if part.targets is None:
            return None, ()
        values, number = np.unique(part.targets, return_inverse=True)
        numbers.append(number.astype(np.int64) + len(names))
        names += [str(value) if len(sets) == 1 else f"{part.name} {value}" for value in values]
    return np.concatenate(numbers), tuple(names)
