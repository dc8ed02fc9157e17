"""Disjoint groups of records, each with a loss of its own: who is together, and the gradient of each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedssl.method import Batch, LossOutput, SSLMethod, Step
from fedssl.model import Model
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import Records, pieces, trainable


def slots(present: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(G, size) int64: the groups of a table of slots in which every slot is taken.

    Who would be together depends on the number of slots and on `rng` only. So emptying one slot takes its group away
    and leaves all others as they are.

    Args:
        present: (n,) bool, whether a record is in each slot.
        size: of a group, at least 1; the n mod size slots that are left over belong to none.
        rng: decides which slots are together.
    """
    order = rng.permutation(len(present))[: len(present) // size * size].reshape(-1, size)
    return order[present[order].all(axis=1)]


def labels(count: int, bins: int, noise: Noise, device: torch.device) -> Tensor:
    """(count,) int64 in [0, bins): independent and uniform, so a record less changes no other record's label."""
    uniform: Tensor = torch.special.ndtr(noise.like(torch.zeros(count, dtype=torch.float64, device=device), 1.0))
    return (uniform * bins).long().clamp(0, bins - 1)


def members(label: Tensor) -> dict[int, Tensor]:
    """By size, the groups (G, size) int64 of positions whose labels are equal."""
    order = torch.argsort(label, stable=True)
    _, counts = torch.unique_consecutive(label[order], return_counts=True)
    groups = torch.split(order, counts.tolist())
    return {size: torch.stack([g for g in groups if len(g) == size]) for size in sorted(set(counts.tolist()))}


class _Objective(nn.Module):
    """The loss of one group as a module whose parameters can be replaced."""

    def __init__(self, method: SSLMethod, model: Model) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(self, views: Sequence[Tensor], index: Tensor, batch: Batch, step: Step) -> LossOutput:
        own = Batch(views, index, batch.public, batch.public_index)
        return self.method.loss(self.model, own, step)


def by_vmap(method: SSLMethod, model: Model, batch: Batch, step: Step, rows: Tensor, share: float) -> Records:
    """The gradients of groups of one size at once.

    Args:
        method, model, step: of the loss.
        batch: whose views are tensors.
        rows: (G, size) positions in the batch.
        share: factor of each group's loss.

    Returns:
        For each trainable parameter (G, *shape); losses (G,); features (G * size, D).
    """
    objective = _Objective(method, model)
    names = [name for name, p in objective.named_parameters() if p.requires_grad]
    values = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], views: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        out: LossOutput = functional_call(objective, parameters, (views, index, batch, step))
        return share * out.loss, out.features.detach()

    each = vmap(grad_and_value(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")
    gradients, (losses, features) = each(values, [view[rows] for view in batch.views], batch.index[rows])
    return Records([gradients[name] for name in names], losses.detach(), features.flatten(0, 1), {})


def by_loop(method: SSLMethod, model: Model, batches: Sequence[Batch], step: Step, share: float) -> Records:
    """Group by group: the definition, and the way of views that are no tensors."""
    parameters = trainable(model)
    rows: list[list[Tensor]] = []
    losses, features = [], []
    for batch in batches:
        out = method.loss(model, batch, step)
        found = torch.autograd.grad(share * out.loss, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        losses.append(share * out.loss.detach())
        features.append(out.features.detach())
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Records(columns, torch.stack(losses), torch.cat(features), {})


def gradients(
    method: SSLMethod,
    model: Model,
    batch: Batch,
    step: Step,
    rows: Tensor,
    share: float,
    *,
    at_once: int,
    vectorised: bool = True,
) -> Iterator[Records]:
    """The gradients of `share` times each group's own loss, `at_once` groups at a time.

    Args:
        method, model, step: of the loss.
        batch: all sampled records. Views that are no tensors can only be cut, so their groups must be consecutive.
        rows: (G, size) positions in the batch.
        share: factor of each group's loss.
        at_once: at least 1.
        vectorised: whether `at_once` groups go through the network together.
    """
    tensors = all(isinstance(view, Tensor) for view in batch.views)
    if not tensors:
        for group in pieces(batch, rows.shape[1]):
            yield by_loop(method, model, [group], step, share)
        return
    for some in torch.split(rows, at_once):
        if vectorised:
            yield by_vmap(method, model, batch, step, some, share)
        else:
            own = [
                Batch([view[r] for view in batch.views], batch.index[r], batch.public, batch.public_index) for r in some
            ]
            yield by_loop(method, model, own, step, share)
