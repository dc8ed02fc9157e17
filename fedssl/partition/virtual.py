"""Virtual clients: as many as wanted of any data set, each with rows of its own that are drawn when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.partition.base import Drawn, Indices, Labels, Parts, Splittable, parts_of, targets_of
from fedssl.partition.draws import check_options, count


def virtual(
    targets: Labels | int, clients: int, rng: np.random.Generator, *, examples: int, alpha: float | None = None
) -> Parts:
    """Draws each client's examples from the whole, by its number alone; clients may share examples.

    Args:
        targets: (n,) labels, or n where alpha is None.
        clients: any number.
        rng: gives the one number from which all draws follow.
        examples: of each client, different ones unless a class has fewer than it should give.
        alpha: each client's class proportions are drawn from Dir(alpha); None draws from all examples alike.

    Raises:
        ConfigError: no client, or a client would have fewer than one or more than all examples.
    """
    n, key = count(targets), int(rng.integers(2**63))
    if clients < 1 or not 1 <= examples <= n:
        raise ConfigError(
            f"{clients} clients with {examples} of {n} examples each are none; use at least one client, and "
            f"partition.examples from 1 to {n}."
        )
    name = f"virtual {n} {examples} {alpha} {key}"
    if alpha is None:
        return Drawn(clients, examples, lambda client: _even(n, examples, seeds.stream(key, "client", client)), name)
    check_options(alpha, examples)
    labels, inverse = np.unique(targets, return_inverse=True)
    classes = parts_of(inverse, len(labels))

    def skewed(client: int) -> Indices:
        own = seeds.stream(key, "client", client)
        wanted = own.multinomial(examples, own.dirichlet(np.full(len(classes), alpha)))
        pairs = [(members, int(k)) for members, k in zip(classes, wanted, strict=True) if k]
        return np.sort(np.concatenate([own.choice(m, k, replace=k > len(m), shuffle=False) for m, k in pairs]))

    return Drawn(clients, examples, skewed, name)


@dataclass(frozen=True)
class Virtual:
    """Any number of clients, who may share examples; see `virtual`.

    Attributes:
        examples: of each client.
        alpha: of the clients' class proportions; null: like those of the whole.
    """

    examples: int = 32
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_options(1.0 if self.alpha is None else self.alpha, self.examples)

    @property
    def uses_labels(self) -> bool:
        """Only with an alpha."""
        return self.alpha is not None

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `virtual`."""
        targets = len(data) if self.alpha is None else targets_of(data, "virtual")
        return virtual(targets, clients, rng, examples=self.examples, alpha=self.alpha)


def _even(n: int, examples: int, rng: np.random.Generator) -> Indices:
    return np.sort(rng.choice(n, examples, replace=False, shuffle=False))
