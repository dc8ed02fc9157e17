"""Measures of the monitor: of one part's outputs, of representations side by side, and of weights before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedssl import diagnostics
from fedssl.errors import ConfigError
from fedssl.parts import part_of

_PAIRS = 1000  # rows from which all pairs are taken
_TOP = 64  # values of a spectrum that are kept
_BLOCK = 1 << 22  # pairs held at once: 32 MiB of float64

Groups = NDArray[np.int64]


def describe(features: Tensor) -> dict[str, Any]:
    """What one part's outputs (N, D) look like, without labels.

    Returns:
        dim, examples, rankme, effective_rank, feature_std, uniformity (see `diagnostics`; pairs of at most 1000 rows)
        and spectrum, the largest 64 values of `spectrum_shares`.
    """
    rankme, effective = diagnostics.ranks(features)
    return {
        "dim": features.shape[1],
        "examples": len(features),
        "rankme": rankme,
        "effective_rank": effective,
        "feature_std": diagnostics.feature_std(features),
        "uniformity": diagnostics.uniformity(thin(features)),
        "spectrum": [float(f"{value:.4g}") for value in spectrum_shares(features)[:_TOP]],
    }


def thin(features: Tensor) -> Tensor:
    """At most 1000 rows, evenly spaced, for measures of all pairs."""
    return features[_thinned(len(features))]


def _thinned(n: int) -> Tensor:
    return torch.arange(n) if n <= _PAIRS else torch.linspace(0, n - 1, _PAIRS).round().long()


def spectrum_shares(x: Tensor) -> NDArray[np.float64]:
    """The eigenvalues of the centred covariance as shares of the features' mean squared length, largest first.

    Free of the features' scale, unlike `diagnostics.spectrum`, so that rounds can be compared.

    Args:
        x: (N, D) features.

    Returns:
        (D,), each in [0, N / (N - 1)]. Their sum is about 1 for centred features and 0 for complete collapse, to one
        point or to zero; a cliff is dimensional collapse.
    """
    values = diagnostics.spectrum(x)
    length = float(x.double().square().sum(1).mean())
    return values / length if length > 0 else np.zeros_like(values)


def uniformity_by_group(x: Tensor, groups: Groups, group: int | None = None) -> tuple[float, float]:
    """Splits `diagnostics.uniformity` into pairs within a group of examples and pairs across groups, such as clients.

    Under label skew features can be even within each client while those of the clients lie on top of each other.

    Args:
        x: (N, D) features.
        groups: (N,) whose each example is.
        group: take only pairs with an example of this group; all pairs by default.

    Returns:
        Within and across, each in [-8, 0]; nan where there is no such pair.

    Raises:
        ConfigError: groups are not one for each row.

    References:
        The split is that of SSD (2025), https://arxiv.org/abs/2508.01251
    """
    if groups.shape != (len(x),):
        raise ConfigError(f"groups has shape {groups.shape} but there are {len(x)} rows; give one group for each row.")
    z = F.normalize(x.detach().cpu().double(), dim=1)  # a zero row stays zero
    owner = torch.from_numpy(np.ascontiguousarray(groups))
    rows = torch.arange(len(z)) if group is None else (owner == group).nonzero()[:, 0]
    square = z.square().sum(1)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for part in torch.split(rows, max(1, _BLOCK // len(z))):
        distance = square[part, None] + square - 2 * (z[part] @ z.T)
        near = distance.clamp_(min=0).mul_(-2).exp_()
        near[torch.arange(len(part)), part] = 0  # an example is no pair with itself
        same = owner[part, None] == owner
        within = (near * same).sum()
        sums += torch.stack([within, near.sum() - within])
        counts += torch.stack([same.sum() - len(part), (~same).sum()])
    within_, across = (float((s / n).log()) if n > 0 else math.nan for s, n in zip(sums, counts, strict=True))
    return within_, across


def by_client(features: Tensor, owners: Groups, client: int | None = None) -> dict[str, float]:
    """uniformity_intra and uniformity_inter of training examples grouped by the client that holds them.

    Args:
        features: (N, D) of training examples; at most 1000 of them are used.
        owners: (N,) the client of each, -1 for those that nobody holds.
        client: of one client: pairs within its own examples, and of its own with others'.
    """
    held = np.flatnonzero(owners >= 0)
    if not len(held):
        return {}
    rows = held[_thinned(len(held)).numpy()]
    pair = uniformity_by_group(features[torch.from_numpy(rows)], owners[rows], client)
    names = ("uniformity_intra", "uniformity_inter")
    return {name: value for name, value in zip(names, pair, strict=True) if not math.isnan(value)}


def likeness(output: Tensor, given: Tensor) -> float:
    """How far a head passes on what it is given: the cosine of the centred output and input, as long vectors.

    1 means the identity up to scale and shift: a head that does nothing. nan where either is constant.

    Args:
        output, given: (N, D) of the same shape.
    """
    a, b = (x.double() - x.double().mean(0) for x in (output, given))
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else math.nan


class WeightLog:
    """Compares what a strategy has made of the clients' weights with their mean, from a few numbers a client.

    A mean of clients that differ is shorter than they are, by the triangle inequality, so the length tells nothing
    wrong. What any mean keeps is its product with a fixed vector, and `now`, from which all clients started, is one:
    <mean, now> is the mean of <client, now>, and whatever the weights it lies between the smallest and the largest.

    Args:
        now: merged parameters as the round begins; buffers, such as batch statistics, differ too much between clients.
    """

    def __init__(self, now: Mapping[str, NDArray[Any]]) -> None:
        self._now = {key: now[key] for key in sorted(now) if np.issubdtype(now[key].dtype, np.floating)}
        self._products: dict[int, dict[str, float]] = {}
        self._squares: dict[int, dict[str, float]] = {}

    def add(self, client: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Read one client's arrays; those that it lacks are left out of the means."""
        mine = {key: arrays[key] for key in self._now if key in arrays}
        self._products[client] = {key: _product(value, self._now[key]) for key, value in mine.items()}
        self._squares[client] = {key: _product(value, value) for key, value in mine.items()}

    def compare(self, merged: Mapping[str, NDArray[Any]], examples: Mapping[int, int]) -> dict[str, dict[str, float]]:
        """For each part: norm_ratio, merge_scale, scale_low and scale_high.

        norm_ratio is the length of the merged part over the mean length of the clients', weighted by examples: at most
        1 for a mean, less the more the clients differ. merge_scale is the merged part's product with `now` over that of
        the clients' mean: the sum of the weights that the strategy gave the clients. It is 1 for the mean by examples,
        and between scale_low and scale_high, the smallest and the largest client's, for any mean.

        Args:
            merged: what the strategy made.
            examples: of each client that replied, its weight here.
        """
        sent = {key for own in self._products.values() for key in own}
        out: dict[str, dict[str, float]] = {}
        for part in sorted({part_of(key) for key in sent}):
            keys = [key for key in self._now if part_of(key) == part and key in sent]
            lengths = {
                client: math.sqrt(sum(own[key] for key in keys))
                for client, own in self._squares.items()
                if all(key in own for key in keys)
            }
            length, start = (math.sqrt(sum(_product(a[key], a[key]) for key in keys)) for a in (merged, self._now))
            mean = _mean(lengths, examples)
            out[part] = {"norm_ratio": length / mean} if mean > 0 else {}
            means = {k: _mean({c: own[k] for c, own in self._products.items() if k in own}, examples) for k in keys}
            expected = sum(means.values())
            if expected > 0.1 * start * mean > 0:  # else the clients have left the start behind, and it says nothing
                clients = [sum(own.get(key, means[key]) for key in keys) for own in self._products.values()]
                product = sum(_product(merged[key], self._now[key]) for key in keys)
                names = ("merge_scale", "scale_low", "scale_high")
                out[part] |= {
                    n: v / expected for n, v in zip(names, (product, min(clients), max(clients)), strict=True)
                }
        return out


def _mean(values: Mapping[int, float], weights: Mapping[int, int]) -> float:
    """Weighted mean over those that have a weight, added in order of the clients; 0 of nothing."""
    chosen = sorted(values.keys() & weights.keys())
    total = sum(weights[client] for client in chosen)
    return sum(weights[client] * values[client] for client in chosen) / total if total else 0.0


def _product(a: NDArray[Any], b: NDArray[Any]) -> float:
    """In float64, and not by BLAS, whose last bit depends on where an array lies."""
    return float((a.astype(np.float64).ravel() * b.ravel()).sum())
