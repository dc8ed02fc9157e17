"""Clusters of equal size on the sphere by Sinkhorn-Knopp, how a server merges clients' centroids, and plain k-means."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses.similarity import unit

_CHECK = 10  # iterations between looks at the error, each of which waits for the device
_LIMIT = 300.0  # exp(-2 * _LIMIT) is still a number in float64


@torch.no_grad()
def sinkhorn(scores: Tensor, *, sharpness: float = 25.0, iterations: int = 100, tolerance: float = 1e-2) -> Tensor:
    """Assigns N points to K clusters of equal size, softly.

    The one matrix `diag(u) exp(sharpness * scores) diag(v)` whose rows sum to 1 and whose columns sum to N / K, found
    by scaling columns and rows in turn, the rows last: they are exact, the columns as near as the scalings bring them.

    Args:
        scores: (N, K), cosines of points and centroids, in [-1, 1].
        sharpness: 1 / the entropic regularisation, above 0 and at most 300; the larger, the harder the assignment.
        iterations: at most so many scalings.
        tolerance: of the largest relative error of a column's sum, at which it stops before.

    Returns:
        (N, K) float64, each value >= 0.

    Raises:
        ConfigError: a sharpness out of its range.

    References:
        Cuturi 2013, https://arxiv.org/abs/1306.0895, algorithm 1
    """
    if not 0 < sharpness <= _LIMIT:
        raise ConfigError(f"sharpness={sharpness} makes no assignment that can be computed: give it in (0, {_LIMIT:g}]")
    kernel = ((scores - scores.max(1, keepdim=True).values).double() * sharpness).exp()  # (N, K)
    share = len(kernel) / kernel.shape[1]
    rows = 1 / kernel.sum(1)  # (N,)
    for i in range(1, iterations + 1):
        columns = share / (rows @ kernel)  # (K,)
        rows = 1 / (kernel @ columns)
        if i % _CHECK == 0 and ((rows @ kernel) * columns / share - 1).abs().max() < tolerance:
            break
    return rows[:, None] * kernel * columns


@torch.no_grad()
def equal_size_clusters(
    points: Tensor, clusters: int, generator: torch.Generator, *, sharpness: float = 25.0, iterations: int = 5
) -> Tensor:
    """Spherical k-means whose assignments are `sinkhorn`'s: no cluster takes most of the points.

    It starts from points drawn without replacement, repeated where there are fewer points than clusters. A cluster that
    no point prefers stays where it is.

    Args:
        points: (N, D) of length 1, N >= 1.
        clusters: K.
        generator: draws the start; on the points' device.
        sharpness: see `sinkhorn`, which scales ten times.
        iterations: of k-means.

    Returns:
        (K, D) float32, of length 1.

    References:
        Lubana et al. 2022, https://arxiv.org/abs/2205.11506, the local clustering of Orchestra
    """
    order = torch.randperm(len(points), generator=generator, device=points.device)
    points = points.float()
    centroids = points[order[torch.arange(clusters, device=points.device) % len(points)]]
    for _ in range(iterations):
        chosen = sinkhorn(points @ centroids.T, sharpness=sharpness, iterations=10).argmax(1)
        centroids = unit(_means(points, chosen, centroids))
    return centroids


def global_centroids(
    start: np.ndarray,
    points: np.ndarray,
    *,
    steps: int = 500,
    lr: float = 0.01,
    momentum: float = 0.9,
    temperature: float = 0.1,
    sharpness: float = 25.0,
) -> np.ndarray:
    """Moves the server's centroids to where they divide the clients' ones into groups of equal size.

    Each step assigns the points by `sinkhorn`, takes a gradient step on the mean of `-cos(assignment, softmax(Z C^T /
    temperature))` over the points, and scales the centroids back to length 1. No random numbers: equal inputs give
    equal bits at an equal number of torch threads. Computed in float64 on the CPU.

    Args:
        start: (K, D), the present centroids; their lengths do not matter.
        points: (N, D), the clients' centroids, of length 1.
        steps, lr, momentum: of the gradient descent.
        temperature: of the softmax, the method's.
        sharpness: see `sinkhorn`.

    Returns:
        (K, D) of the type of `start`, each row of length 1.

    References:
        Lubana et al. 2022, https://arxiv.org/abs/2205.11506, the global clustering of Orchestra; the loss is that of
        the authors' code
    """
    z = unit(torch.from_numpy(points.astype(np.float64)))  # (N, D)
    centroids = unit(torch.from_numpy(start.astype(np.float64))).requires_grad_()
    optimizer = torch.optim.SGD([centroids], lr=lr, momentum=momentum)
    for _ in range(steps):
        logits = z @ centroids.T  # (N, K)
        wanted = sinkhorn(logits.detach(), sharpness=sharpness)
        loss = -F.cosine_similarity(wanted, F.softmax(logits / temperature, dim=1), dim=1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        optimizer.step()
        with torch.no_grad():
            centroids.copy_(unit(centroids))
    return centroids.detach().numpy().astype(start.dtype)


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, *, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from a start that needs no random numbers; it does not wait for the device.

    The first centroid is the point farthest from the mean, each further one the point farthest from those before
    (Gonzalez 1985). With fewer distinct points than clusters some clusters stay empty, and an empty cluster stays where
    it is.

    Args:
        points: (N, D), N >= 1.
        clusters: K.
        iterations: of Lloyd's.

    Returns:
        (N,) int64, the cluster of each point, and (K, D) float32, the centroids it was nearest to.
    """
    points = points.detach().float()
    away = (points - points.mean(0)).square().sum(1)  # (N,) squared distance to the nearest centroid so far
    chosen: list[Tensor] = []
    for i in range(clusters):
        chosen.append(points[away.argmax(keepdim=True)][0])  # a row by a scalar would be waited for
        distance = (points - chosen[-1]).square().sum(1)
        away = distance if i == 0 else torch.minimum(away, distance)
    centroids = torch.stack(chosen)
    nearest = torch.cdist(points, centroids).argmin(1)
    for _ in range(iterations):
        centroids = _means(points, nearest, centroids)
        nearest = torch.cdist(points, centroids).argmin(1)
    return nearest, centroids


def _means(points: Tensor, chosen: Tensor, before: Tensor) -> Tensor:
    """(K, D) the mean of each cluster's points; an empty cluster's is the one before."""
    members = F.one_hot(chosen, len(before)).to(points)  # (N, K)
    count = members.sum(0)[:, None]
    return torch.where(count > 0, members.T @ points / count.clamp(min=1), before)
