"""How unequal a split is, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.partition.base import Drawn, Labels, Parts, rows_of, sizes_of, some_of


def fingerprint(parts: Parts) -> str:
    """The sha256 of a split in hex: equal exactly when the parts or their rules are, on every platform."""
    if isinstance(parts, Drawn):
        return hashlib.sha256(f"{parts.name} {len(parts)}".encode()).hexdigest()
    digest = hashlib.sha256(np.asarray(sizes_of(parts), dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(rows_of(parts), dtype="<i8").tobytes())
    return digest.hexdigest()


def heterogeneity(parts: Parts, targets: Labels | None) -> dict[str, float]:
    """How unequal a split is; of very many clients that are drawn by a rule, a sample.

    Returns:
        label_emd: mean over clients, weighted by size, of half the L1 distance between the client's label distribution
            and that of all parts together, in [0, 1]: 0 equal, 1 - 1/K when each client has one of K equal classes.
            Absent without targets.
        gini: of the sizes, in [0, 1): 0 equal, towards 1 when one client has everything.
        smallest, largest: sizes.
    """
    parts = some_of(parts)[0] if isinstance(parts, Drawn) else parts
    sizes = np.sort(sizes_of(parts))
    total, clients = int(sizes.sum()), len(sizes)
    gini = float((2 * np.arange(1, clients + 1) - clients - 1) @ sizes / (clients * total))
    found = {"gini": gini, "smallest": float(sizes[0]), "largest": float(sizes[-1])}
    if targets is not None:
        labels, inverse = np.unique(targets, return_inverse=True)
        cells = np.repeat(np.arange(clients), sizes_of(parts)) * len(labels) + inverse[rows_of(parts)]
        counts = np.bincount(cells, minlength=clients * len(labels)).reshape(clients, -1).astype(np.float64)
        whole = counts.sum(0) / total
        own = counts.sum(1, keepdims=True)
        found["label_emd"] = float(np.abs(counts - own * whole).sum() / 2 / total)
    return found


def feature_skew(statistics: Sequence[NDArray[Any]]) -> float | None:
    """How far clients differ in what their examples look like: the share of the variance that lies between clients.

    Args:
        statistics: one (n_k, F) array a client, simple numbers of its examples.

    Returns:
        The mean over the F numbers of the share of their variance that the client explains, without the part that
        chance explains (epsilon squared), in [0, 1]: 0 the clients look alike, 1 each has a look of its own. None for
        one client, or with no more examples than clients.

    References:
        Kelley 1935, An unbiased correlation ratio measure, doi:10.1073/pnas.21.9.554.
    """
    clients = len(statistics)
    everything = np.concatenate(statistics).astype(np.float64)
    if clients < 2 or len(everything) <= clients:
        return None
    total = np.square(everything - everything.mean(0)).sum(0)
    within = sum(np.square(own - own.mean(0)).sum(0) for own in statistics)
    chance = within / (len(everything) - clients)
    varies = total > 1e-12 * len(everything)
    explained = (total - within - (clients - 1) * chance)[varies] / total[varies]
    return max(0.0, float(explained.mean())) if varies.any() else 0.0
