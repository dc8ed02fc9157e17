"""Per-row clipping of losses that couple the rows: what hooks on layers give when asked for per-example gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedssl.losses import info_nce, negative_cosine

Pair = tuple[Tensor, Tensor]  # two views (n, F) of n records


def encoder() -> nn.Module:
    """A toy encoder in float64 with fixed weights."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    for parameter in network.parameters():
        parameter.requires_grad_(False).copy_(
            0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        )
    return network.requires_grad_()


def duplicates_and_outlier(n: int) -> Pair:
    """n - 1 identical records and one that differs, the last. Alone, the identical ones have no InfoNCE gradient."""
    generator = torch.Generator().manual_seed(1)
    first, second, odd, other = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    views = [torch.cat((one.expand(n - 1, 8), last[None])) for one, last in ((first, odd), (second, other))]
    return views[0], views[1]


def rows_of_info_nce(network: nn.Module, views: Pair) -> Tensor:
    """(n, P): J_i^T dL/dz_i + J_i'^T dL/dz_i', the gradient that flows through row i; L couples all rows."""
    leaves = [network(view).detach().requires_grad_() for view in views]
    info_nce(leaves[0], leaves[1], temperature=0.5).sum().backward()
    parameters = dict(network.named_parameters())

    def row(x: Tensor, cotangent: Tensor) -> Tensor:
        _, pull = torch.func.vjp(lambda p: functional_call(network, p, (x[None],))[0], parameters)
        (gradient,) = pull(cotangent)
        return torch.cat([value.flatten() for value in gradient.values()])

    both = [vmap(row)(view, leaf.grad) for view, leaf in zip(views, leaves, strict=True)]
    return both[0] + both[1]


def rows_of_byol(network: nn.Module, views: Pair) -> Tensor:
    """(n, P): the gradient of each record's own loss, both directions; it reads no other record."""
    parameters = dict(network.named_parameters())

    def loss(p: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
        a, b = (functional_call(network, p, (x[None],)) for x in (first, second))
        return (negative_cosine(a, b) + negative_cosine(b, a))[0]

    gradient = vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *views)
    return torch.cat([value.flatten(1) for value in gradient.values()], 1)


def clipped(rows: Tensor, bound: float) -> Tensor:
    """Rows no longer than the bound."""
    return rows * (bound / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1)


def clipped_sum(rows_of: Callable[[nn.Module, Pair], Tensor], n: int, bound: float) -> tuple[Tensor, Tensor]:
    """The sum of clipped rows with the outlier and without it."""
    network, views = encoder(), duplicates_and_outlier(n)
    without = (views[0][:-1], views[1][:-1])
    present, absent = (clipped(rows_of(network, batch), bound).sum(0).detach() for batch in (views, without))
    return present, absent


def noisy(present: Tensor, absent: Tensor, deviation: float) -> Callable[[bool, np.random.Generator], Tensor]:
    """A release of either sum with Gaussian noise."""

    def release(there: bool, rng: np.random.Generator) -> Tensor:
        return (present if there else absent) + deviation * torch.from_numpy(rng.standard_normal(present.shape))

    return release
