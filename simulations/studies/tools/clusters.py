"""T4 in clusters: pairs of known information whose clients hold different clusters, and critics of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedssl import seeds
from fedssl.diagnostics import mutual_information_bound
from fedssl.losses import info_nce
from fedssl.model import load_arrays, seed_parameters, to_arrays
from fedssl.theory import gaussian_correlation
from fedssl.tree import ExactMean

Array = NDArray[np.float64]
Draw = Callable[[int], tuple[Array, Array]]  # of pairs, (N, 2) each


@dataclass(frozen=True)
class Clusters:
    """A cluster c has its centre on a circle; x = centre + u, y = centre + v, and u, v are correlated Gaussians.

    Args:
        count: of clusters, as many as clients.
        inside: I(x; y | c) in nats.
        radius: of the circle, in deviations of u: with 4 or more clusters hardly overlap.
    """

    count: int = 4
    inside: float = 1.0
    radius: float = 4.0

    @property
    def centres(self) -> Array:
        """(C, 2)."""
        angle = 2 * np.pi * np.arange(self.count) / self.count
        return self.radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def weights(self, skew: float, client: int = 0) -> Array:
        """(C,): a client's clusters: its own with the probability `skew`, else any."""
        found: Array = (1 - skew) / self.count + skew * (np.arange(self.count) == client)
        return found

    def draw(self, weights: Array, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Pairs (N, 2) and (N, 2)."""
        rho = gaussian_correlation(self.inside, 2)
        centre = self.centres[rng.choice(self.count, count, p=weights)]
        u, v = rng.standard_normal((2, count, 2))
        return centre + u, centre + rho * u + math.sqrt(1 - rho**2) * v

    def log_ratio(self, weights: Array, x: Array, y: Array) -> Array:
        """`log p(y|x) - log p(y)` of pairs (..., 2) that are broadcast against one another."""
        rho = gaussian_correlation(self.inside, 2)
        prior = np.log(np.maximum(weights, 1e-300))
        u, v = x[..., None, :] - self.centres, y[..., None, :] - self.centres
        of_x, of_y = -(u**2).sum(-1) / 2, -(v**2).sum(-1) / 2  # (..., C), without log 2 pi, which drops out
        given = -((v - rho * u) ** 2).sum(-1) / (2 * (1 - rho**2)) - math.log1p(-(rho**2))
        both = np.logaddexp.reduce(prior + of_x + given, axis=-1)
        apart = np.logaddexp.reduce(prior + of_x, axis=-1) + np.logaddexp.reduce(prior + of_y, axis=-1)
        return np.asarray(both - apart)

    def information(self, weights: Array, count: int, rng: np.random.Generator) -> float:
        """I(x; y) in nats under these weights, by Monte Carlo: error about 1.2 / sqrt(count)."""
        return float(self.log_ratio(weights, *self.draw(weights, count, rng)).mean())

    def bias(self, weights: Array, candidates: int, trials: int, rng: np.random.Generator) -> float:
        """I minus the bound that the optimal critic reaches in batches of N pairs drawn with these weights.

        With the ratio as critic it is the mean of `log mean_j r(x_i, y_j)`, whose error is far below that of the bound.
        """
        total = 0.0
        batches = max(2, trials // candidates)
        for _ in range(batches):
            x, y = self.draw(weights, candidates, rng)
            ratio = self.log_ratio(weights, x[:, None], y[None])  # (N, N)
            total += float(np.logaddexp.reduce(ratio, axis=1).mean()) - math.log(candidates)
        return total / batches


def critic(seed: int, width: int = 48, out: int = 24) -> nn.ModuleDict:
    """Two encoders whose dot product is the critic."""

    def encoder() -> nn.Sequential:
        layers = (nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))
        return nn.Sequential(*layers)

    found = nn.ModuleDict({"x": encoder(), "y": encoder()})
    seed_parameters(found, seed)
    return found


def losses(model: nn.ModuleDict, x: Array, y: Array) -> Tensor:
    """InfoNCE of each x among all y of the batch."""
    u, v = (torch.from_numpy(a).float() / 4 for a in (x, y))  # clusters lie 4 from the origin
    return info_nce(model["x"](u), model["y"](v), temperature=1.0, similarity="dot")


def train(draws: list[Draw], candidates: int, rounds: int, steps: int, seed: int) -> nn.ModuleDict:
    """A critic by federated averaging: one source of local batches a client, all of one weight."""
    model = critic(seed)
    for at in range(rounds):
        start, merged = to_arrays(model), ExactMean()
        for draw in draws:
            load_arrays(model, start)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.004 * min(1.0, 2 * (1 - at / rounds)))
            for _ in range(steps):
                optimizer.zero_grad()
                losses(model, *draw(candidates)).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            merged.add(to_arrays(model), 1.0)
        load_arrays(model, merged.result(start))
    return model


@torch.no_grad()
def bound(model: nn.ModuleDict, draw: Draw, candidates: int, trials: int) -> float:
    """`log N - L` in nats of a critic on fresh batches of N pairs."""
    batches = max(2, trials // candidates)
    loss = sum(float(losses(model, *draw(candidates)).mean()) for _ in range(batches)) / batches
    return mutual_information_bound(loss, candidates)


def source(clusters: Clusters, weights: Array, seed: int, *path: str | int) -> Draw:
    """Batches of a client, from a stream of its own."""
    rng = seeds.stream(seed, "study", "clusters", *path)
    return lambda count: clusters.draw(weights, count, rng)
