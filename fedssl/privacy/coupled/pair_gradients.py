"""The sum of clipped gradients of all pairs of a batch without ever building one of them.

A pair's gradient is `grad s_ab = J_a^T u_ab + J_b^T u_ba`, J_a the Jacobian (K, P) of view a's projection and
`u_ab = ds_ab / dh_a`. Its length is at most `sqrt(u_ab^T G_a u_ab) + sqrt(u_ba^T G_b u_ba)` with the Gram matrices
`G = J J^T` (K, K), which take K backward passes a view instead of one a pair; the clipped sum then is one backward pass
whose cotangents carry weights and clipping factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fedssl.method import View
from fedssl.model import Model
from fedssl.networks.heads import embed
from fedssl.privacy.per_record import trainable

_TINY_NORM = 1e-12  # as in fedssl.losses.similarity: a shorter projection has no direction
_HELD = 2**24  # numbers of a temporary


@dataclass(frozen=True)
class Seen:
    """What the clipping of pairs needs to know of views.

    Attributes:
        projections: (m, K) float64.
        grams: (m, K, K) float64, positive semi-definite.
    """

    projections: Tensor
    grams: Tensor

    def sound(self) -> Tensor:
        """(m,) bool, whether a view's numbers are finite; it depends on that view only."""
        numbers = torch.cat([self.projections, self.grams.flatten(1), self.projections.norm(dim=1, keepdim=True)], 1)
        return numbers.isfinite().all(1)

    def only(self, rows: Tensor) -> Seen:
        """Some of the views."""
        return Seen(self.projections[rows], self.grams[rows])


class _Projected(nn.Module):
    """The projection (K,) of one view, as a module whose parameters can be replaced."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, view: Tensor) -> Tensor:
        _, (projection,) = embed(self.model, [view[None]])
        return projection[0]


def look(model: Model, views: Sequence[Tensor], held: int) -> Seen:
    """Projections and Gram matrices of all views, the first of every record, then the second.

    Args:
        model: encoder and projector.
        views: each (n, ...), n at least 1.
        held: gradients of the whole model held at once; a view needs K of them, and gets them in any case.
    """
    projected = _Projected(model)
    values = {name: p.detach() for name, p in projected.named_parameters() if p.requires_grad}

    def both(parameters: dict[str, Tensor], view: Tensor) -> tuple[Tensor, Tensor]:
        found = cast(Tensor, functional_call(projected, parameters, (view,)))
        return found, found.detach()

    each = vmap(jacrev(both, has_aux=True), in_dims=(None, 0))
    rows = torch.cat(list(views))
    with torch.no_grad():
        width = embed(model, [rows[:1]])[1][0].shape[1]
    projections, grams = [], []
    for some in torch.split(rows, max(1, held // width)):
        jacobians, found = each(values, some)
        flat = (j.detach()[..., None].flatten(2).double() for j in jacobians.values())
        grams.append(torch.stack([j @ j.mT for j in flat]).sum(0))
        projections.append(found.double())
    return Seen(torch.cat(projections), torch.cat(grams))


def directions(projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Units (m, K), 1 / length (m, 1), and whether there is a direction at all (m, 1): `similarity.unit` as numbers."""
    lengths = projections.norm(dim=1, keepdim=True)
    valid = lengths > _TINY_NORM
    scale = 1 / torch.where(valid, lengths, 1.0)
    return projections * scale, scale, valid.to(projections.dtype)


def bounds(seen: Seen) -> Tensor:
    """(m, m) an upper bound of the length of each pair's gradient."""
    unit, scale, valid = directions(seen.projections)
    scores = unit @ unit.T
    m, k = unit.shape
    rows = []
    for some in torch.split(torch.arange(m, device=unit.device), max(1, _HELD // (m * k))):
        u = (unit[None] - (valid * scores)[some, :, None] * unit[some, None]) * scale[some, None]  # (s, m, K)
        rows.append(((u @ seen.grams[some]) * u).sum(2).clamp(min=1e-60).sqrt())
    one = torch.cat(rows)
    return one + one.T


def scores_of(seen: Seen) -> Tensor:
    """(m, m) cosines; what rounding has moved out of [-1, 1] is put back, for bounds rest on that."""
    unit, _, _ = directions(seen.projections)
    return (unit @ unit.T).clamp(-1, 1)


def cotangents(seen: Seen, weights: Tensor, clip_norm: float) -> Tensor:
    """(m, K) what to send back from the projections: `sum_b (W_ab + W_ba) c_ab u_ab`, c the factors of clipping."""
    unit, scale, valid = directions(seen.projections)
    factors = (clip_norm / bounds(seen)).nan_to_num(nan=0.0, posinf=1.0).clamp(max=1.0)
    both = (weights + weights.T) * factors
    along = (both * scores_of(seen)).sum(1, keepdim=True)
    return scale * (both @ unit - valid * along * unit)


def pulled_back(model: Model, views: Sequence[View], cotangent: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """One forward and one backward pass of the whole batch.

    Args:
        model: encoder and projector.
        views: each with n records.
        cotangent: (2 n, K) of their projections.

    Returns:
        For each trainable parameter its sum; the projections, one (n, K) a view; the features (n, D) of the first.
    """
    features, projections = embed(model, views)
    parameters = trainable(model)
    pulled = (torch.cat(projections) * cotangent.to(projections[0].dtype)).sum()
    found = torch.autograd.grad(pulled, parameters, allow_unused=True)
    sums = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return sums, [z.detach() for z in projections], features[0].detach()
