"""Gradients of records as sums of outer products, which are measured and added up without being multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """The gradients `sum_t g[i, t] a[i, t]^T` of n records.

    The length of one follows from inner products, `sum_st (g_s . g_t) (a_s . a_t)` (Goodfellow 2015,
    https://arxiv.org/abs/1510.01799; for convolutions Rochette et al. 2019, https://arxiv.org/abs/1912.06015), and a
    weighted sum over records is one matrix product, so no gradient is ever held (Bu et al. 2022,
    https://arxiv.org/abs/2210.00038). t runs over positions *and* over all uses of a layer: a record's views meet in
    its length.

    Attributes:
        g: (n, T, outputs) gradients of the loss at a layer's outputs.
        a: (n, T, inputs) what its weights were multiplied with; of convolutions kernel by channels.
        shape: of the weight (outputs, channels, *kernel).
    """

    g: Tensor
    a: Tensor
    shape: torch.Size

    def __len__(self) -> int:
        return len(self.g)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.g.device

    @property
    def small(self) -> bool:
        """Whether the inner products cost little beside the gradients multiplied out, as measured on a CPU."""
        positions, (outputs, inputs) = self.g.shape[1], (self.g.shape[2], self.a.shape[2])
        return positions**2 * (inputs + outputs) < 4 * inputs * outputs

    def lengths(self) -> tuple[Tensor, Tensor]:
        """(n,) float64 each: the lengths, and an upper bound that holds also where terms cancel out.

        A length is as precise as the square of that bound: compare both before trusting it.
        """
        own, other = torch.bmm(self.g, self.g.mT), torch.bmm(self.a, self.a.mT)
        squares = (own.double() * other).sum((1, 2))
        return squares.clamp(min=0).sqrt(), (_trace(own) * _trace(other)).sqrt()

    def weighted(self, factors: Tensor) -> Tensor:
        """The sum of the gradients times `factors` (n,)."""
        scaled = self.g * factors.to(self.g.dtype).view(-1, 1, 1)
        return _turned(scaled.flatten(0, 1).T @ self.a.flatten(0, 1), self.shape)

    def only(self, sound: Tensor) -> Outer:
        """Those of the records in `sound` (n,); zeros for the others, whatever they were."""
        g, a = (torch.where(sound.view(-1, 1, 1), x, torch.zeros_like(x)) for x in (self.g, self.a))
        return Outer(g, a, self.shape)

    def dense(self) -> Tensor:
        """(n, *shape) multiplied out, in memory of its own."""
        return _turned(torch.bmm(self.g.mT, self.a), self.shape)


def _turned(flat: Tensor, shape: torch.Size) -> Tensor:
    """(..., outputs, kernel by channels) as (..., outputs, channels, *kernel), without a copy."""
    outputs, channels, *kernel = shape
    return flat.view(*flat.shape[:-2], outputs, *kernel, channels).movedim(-1, -1 - len(kernel))


def _trace(squares: Tensor) -> Tensor:
    return squares.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
