"""Label skew: each class is divided in proportions from a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError
from fedssl.partition.base import Indices, Labels, Parts, Splittable, targets_of
from fedssl.partition.draws import at_least, check, check_options, cut, dirichlet_shares

SIZES = ("free", "capped", "equal")
_ALTERNATIONS = 50  # what Orchestra's 100 passes come to: they scale by rows and columns at once, which repeats itself
_TINY = 1e-200  # in place of a zero, so that every row and column can be scaled

Shares = NDArray[np.float64]


def dirichlet(
    targets: Labels,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float,
    min_size: int = 2,
    sizes: str = "free",
) -> Parts:
    """Divides each class among the clients in proportions drawn from Dir(alpha): label skew.

    Args:
        targets: (n,) labels.
        clients: number of parts.
        rng: the only source of randomness.
        alpha: > 0; small: a client sees few classes; large: the split tends to `iid`.
        min_size: >= 1; re-drawn up to `REDRAWS` times until it holds, then examples move from the largest parts.
        sizes: what the draw says of the parts' sizes. "free": whatever it gives, so that quantities are skewed too.
            "capped": class by class, a client that holds n / clients or more gets none of the next ones, as in the
            codes of FedX, MOON and EasyFL. "equal": the proportions are scaled, 50 times over clients and classes
            (Sinkhorn), until every client has about as much, as Orchestra does with optimal transport.

    Raises:
        ConfigError: an option out of range, or fewer than clients * min_size examples.

    References:
        Hsu et al. 2019, arXiv:1909.06335; Li et al. 2022, arXiv:2102.02079; Han et al. 2022, arXiv:2207.09158 (FedX,
        `partition_data`); Lubana et al. 2022, arXiv:2205.11506 (Orchestra, `sampler.py`).
    """
    _check(alpha, min_size, sizes)
    check(len(targets), clients, min_size)
    members = [np.flatnonzero(targets == label) for label in np.unique(targets)]

    def free() -> Indices:
        return _deal(members, lambda size: cut(size, dirichlet_shares(clients, alpha, rng)), rng)

    def capped() -> Indices:
        held, fair = np.zeros(clients), len(targets) / clients

        def among_the_small(size: int) -> Indices:
            drawn = (dirichlet_shares(clients, alpha, rng) + _TINY) * (held < fair)  # some client is below its share
            owners = cut(size, drawn / drawn.sum())
            held[:] += np.bincount(owners, minlength=clients)
            return owners

        return _deal(members, among_the_small, rng)

    def equal() -> Indices:
        return _transported(members, np.full(clients, len(targets) / clients), alpha, rng)

    return at_least({"free": free, "capped": capped, "equal": equal}[sizes], clients, min_size, rng)


def mixed_skew(
    targets: Labels,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float,
    quantity_alpha: float,
    min_size: int = 2,
) -> Parts:
    """Skews labels and quantities at once, each by its own amount.

    The parts' sizes are drawn from Dir(quantity_alpha), each class's proportions from Dir(alpha), and the proportions
    are scaled (Sinkhorn) until the parts have about those sizes.

    Args:
        targets: (n,) labels.
        clients: number of parts.
        rng: the only source of randomness.
        alpha: > 0, of the labels; large: every client sees all classes as the whole does.
        quantity_alpha: > 0, of the sizes; large: equal sizes.
        min_size: >= 1, as in `dirichlet`.

    Raises:
        ConfigError: an option out of range, or fewer than clients * min_size examples.
    """
    _check(alpha, min_size, "free")
    check_options(quantity_alpha, min_size, "quantity_alpha")
    check(len(targets), clients, min_size)
    members = [np.flatnonzero(targets == label) for label in np.unique(targets)]

    def draw() -> Indices:
        wanted = len(targets) * dirichlet_shares(clients, quantity_alpha, rng)
        return _transported(members, wanted, alpha, rng)

    return at_least(draw, clients, min_size, rng)


def scaled(weights: Shares, rows: Shares, columns: Shares, alternations: int = _ALTERNATIONS) -> Shares:
    """Multiplies rows and columns of `weights` (R, C) in turn until they add up to `rows` (R,) and `columns` (C,).

    The columns are exact, the rows as close as so many turns bring them (Sinkhorn & Knopp 1967).
    """
    out = np.maximum(weights, _TINY)
    for _ in range(alternations):
        out = out * (rows / np.maximum(out.sum(1), _TINY))[:, None]
        out = out * (columns / np.maximum(out.sum(0), _TINY))
    return out


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: class proportions from Dir(alpha)."""

    alpha: float = 0.3
    min_size: int = 2
    sizes: str = "free"
    uses_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.alpha, self.min_size, self.sizes)

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `dirichlet`."""
        targets = targets_of(data, "dirichlet")
        return dirichlet(targets, clients, rng, alpha=self.alpha, min_size=self.min_size, sizes=self.sizes)


@dataclass(frozen=True)
class MixedSkew:
    """Labels skewed by Dir(alpha) and, on their own, sizes by Dir(quantity_alpha)."""

    alpha: float = 0.3
    quantity_alpha: float = 0.5
    min_size: int = 2
    uses_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.alpha, self.min_size, "free")
        check_options(self.quantity_alpha, self.min_size, "quantity_alpha")

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `mixed_skew`."""
        options = {"alpha": self.alpha, "quantity_alpha": self.quantity_alpha}
        return mixed_skew(targets_of(data, "mixed_skew"), clients, rng, **options, min_size=self.min_size)


def _check(alpha: float, min_size: int, sizes: str) -> None:
    check_options(alpha, min_size)
    if sizes not in SIZES:
        raise ConfigError(f"sizes is {sizes!r}, which is not known; use {', '.join(SIZES)}.")


def _deal(members: Parts, owners: Callable[[int], Indices], rng: np.random.Generator) -> Indices:
    """(n,) owners: `owners` is asked for those of each class in turn, which its shuffled examples take."""
    owner = np.empty(sum(map(len, members)), np.int64)
    for index in members:
        drawn = owners(len(index))
        owner[rng.permutation(index)] = drawn
    return owner


def _transported(members: Parts, sizes: Shares, alpha: float, rng: np.random.Generator) -> Indices:
    """(n,) owners: classes in Dir(alpha) proportions, scaled to parts of these sizes."""
    counts = np.array([len(index) for index in members], np.float64)
    drawn = np.stack([dirichlet_shares(len(sizes), alpha, rng) for _ in members], 1)  # (clients, classes)
    amounts = iter(scaled(drawn * counts, sizes, counts).T / counts[:, None])
    return _deal(members, lambda size: cut(size, next(amounts)), rng)
