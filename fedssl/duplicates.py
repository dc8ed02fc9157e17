"""Near-duplicates: finding them on small descriptors, keeping them with one client, and counting those that leak.

A near-duplicate on another client, or in the test set, makes a split look less private or a probe better than it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Data, Table
from fedssl.errors import ConfigError
from fedssl.partition import FeatureShift, Iid, Indices, Partition, Parts, Splittable, Stored, Virtual
from fedssl.partition.base import owner_of
from fedssl.partition.together import split_together

_SIDE = 8  # of the thumbnail of each channel of an image
_STEPS = 32  # of the summary of each channel of a series
_READ = 2048  # examples described at a time
_ROWS, _COLUMNS = 512, 8192  # of a block of similarities: 16 MB
_SLACK = 1e-4  # of a float32 similarity, before the exact distance is taken
_MOST = 20_000_000  # pairs, 320 MB

Descriptors = NDArray[np.float64]


def descriptors(table: Table) -> Descriptors:
    """(N, D) of unit length: small thumbnails, blind to each channel's level and to the example's contrast.

    Images are averaged over 8 x 8 cells, series over 32 spans. Computed on the CPU in double precision, so that all
    machines of a federation find the same near-duplicates.

    Raises:
        ConfigError: the examples are neither images (B, C, H, W) nor time series (B, C, T).
    """
    rows = torch.arange(len(table), device=table.device)
    return np.concatenate([_described(table.batch(part)).numpy() for part in torch.split(rows, _READ)])


def near_pairs(x: Descriptors, y: Descriptors | None = None, *, threshold: float) -> Indices:
    """Every pair of descriptors at most `threshold` apart.

    Exact, block by block. The examples are swept along their first principal direction, where near-duplicates cannot be
    further apart than the threshold either, which spares most comparisons.

    Args:
        x: (N, D) of unit length, see `descriptors`.
        y: (M, D) to compare with; None compares x with itself, each pair once.
        threshold: Euclidean distance, in (0, 1): 0 the same picture, about 1.4 unrelated ones.

    Returns:
        (P, 2) positions in x and in y, sorted; within x, the smaller one first.

    Raises:
        ConfigError: threshold out of range, or so large that it links almost everything.
    """
    _check(threshold)
    ours = _Swept.of(x, _direction(x))
    theirs = ours if y is None else _Swept.of(y, _direction(x))
    found, total = [np.empty((0, 2), np.int64)], 0
    for pairs in _sweep(ours, theirs, threshold):
        a, b = ours.order[pairs[:, 0]], theirs.order[pairs[:, 1]]
        found.append(np.stack((np.minimum(a, b), np.maximum(a, b)) if y is None else (a, b), 1))
        total += len(pairs)
        if total > _MOST:
            raise ConfigError(
                f"More than {_MOST:,} pairs are within {threshold} of each other, so the descriptors do not tell these "
                "examples apart; use a smaller partition.threshold."
            )
    every = np.concatenate(found)
    return every[np.lexsort((every[:, 1], every[:, 0]))]


def clusters(x: Descriptors, *, threshold: float) -> Indices:
    """(N,) the smallest position of each example's cluster: near-duplicates of near-duplicates belong together."""
    first, second = near_pairs(x, threshold=threshold).T
    found = np.arange(len(x))
    while np.any(found[first] != found[second]):  # both ends take the smaller number, until all agree
        least = np.minimum(found[first], found[second])
        np.minimum.at(found, first, least)
        np.minimum.at(found, second, least)
        found = found[found]
    return found


def leaks(data: Data, parts: Sequence[Indices], *, threshold: float) -> dict[str, float]:
    """How many examples have a near-duplicate where it should not be.

    Args:
        data: training and test set.
        parts: the clients' rows of the training set.
        threshold: as in `near_pairs`.

    Returns:
        threshold: as given.
        across_clients: training examples with a near-duplicate on another client.
        train_test: test examples with a near-duplicate in the training set.
    """
    train, test = descriptors(data.train), descriptors(data.test)
    pairs, owner = near_pairs(train, threshold=threshold), owner_of(parts)
    apart = pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]]
    shared = near_pairs(test, train, threshold=threshold)[:, 0]
    counts = {"across_clients": len(np.unique(apart)), "train_test": len(np.unique(shared))}
    return {"threshold": threshold, **counts}


@dataclass(frozen=True)
class DuplicateSafe:
    """Near-duplicates stay with one client; the first of each cluster is split by `base` and the others follow it.

    Args:
        threshold: as in `near_pairs`; docs/data.md says what 0.15 finds. Pictures with little in them need less.
        base: how the examples are split otherwise.

    Raises:
        ConfigError: threshold out of range, or a base that does not fit.
    """

    threshold: float = 0.15
    base: Partition = field(default_factory=Iid)

    def __post_init__(self) -> None:
        _check(self.threshold)
        if isinstance(self.base, FeatureShift | Stored | DuplicateSafe | Virtual):
            raise ConfigError(
                f"partition.base is {type(self.base).__name__}, which cannot be inside a duplicate-safe split; give "
                "feature_shift this split as its base, and take a stored split as it is."
            )

    @property
    def uses_labels(self) -> bool:
        """Whether the base does."""
        return self.base.uses_labels

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `fedssl.partition.keep_together`."""
        found = clusters(descriptors(cast(Table, data)), threshold=self.threshold)
        return split_together(data, clients, rng, found, self.base)


@dataclass(frozen=True, eq=False)
class _Swept:
    """Descriptors in the order of their place along a direction."""

    exact: Descriptors
    quick: NDArray[np.float32]
    place: Descriptors  # (N,) ascending
    order: Indices  # (N,) their positions before

    @classmethod
    def of(cls, x: Descriptors, direction: Descriptors) -> _Swept:
        place = x @ direction
        order = np.argsort(place, kind="stable")
        exact = x[order]
        return cls(exact, exact.astype(np.float32), place[order], order)


def _sweep(ours: _Swept, theirs: _Swept, threshold: float) -> Iterator[Indices]:
    """(p, 2) near pairs of swept positions, block by block; within one set, the first before the second."""
    least = 1 - threshold**2 / 2 - _SLACK  # |a - b|^2 = 2 - 2ab
    for start in range(0, len(ours.place), _ROWS):
        rows = slice(start, start + _ROWS)
        near = ours.place[rows][0] - threshold - _SLACK, ours.place[rows][-1] + threshold + _SLACK
        low, high = np.searchsorted(theirs.place, near)
        for left in range(start if ours is theirs else low, high, _COLUMNS):
            columns = slice(left, min(left + _COLUMNS, high))
            a, b = np.nonzero(ours.quick[rows] @ theirs.quick[columns].T >= least)
            pairs = np.stack((a + start, b + left), 1)
            if ours is theirs:
                pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            gap = ours.exact[pairs[:, 0]] - theirs.exact[pairs[:, 1]]
            yield pairs[np.square(gap).sum(1) <= threshold**2]


def _direction(x: Descriptors) -> Descriptors:
    """(D,) of unit length: where a sample of at most 2,000 descriptors varies most."""
    some = x[:: -(-len(x) // 2000)]
    return np.asarray(np.linalg.eigh(np.atleast_2d(some.T @ some / len(some)))[1][:, -1])


def _described(x: Any) -> Tensor:
    """(B, D) float64 on the CPU."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        raise ConfigError("Near-duplicates are found in images and time series only; use another partition.")
    x = x.cpu().double()
    small = F.adaptive_avg_pool2d(x, _SIDE) if x.dim() == 4 else F.adaptive_avg_pool1d(x, _STEPS)
    level = (small - small.mean(tuple(range(2, x.dim())), keepdim=True)).flatten(1)
    length = level.norm(dim=1, keepdim=True)
    flat = (length < 1e-6 * (1 + x.flatten(1).abs().amax(1, keepdim=True))).double()  # all flat examples are alike
    return torch.cat((level / length.clamp(min=1e-12) * (1 - flat), flat), 1)


def _check(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ConfigError(
            f"partition.threshold is {threshold} but it is a distance between descriptors of unit length; choose it "
            "between 0 and 1, e.g. 0.15."
        )
