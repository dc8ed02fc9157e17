"""Group normalisation of many models at once, in the memory layout that their convolutions leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    """Under `vmap`, K models' channels lie side by side, (B, K * C, ...), as a grouped convolution has put them.

    torch's own rule moves the models to the front, which copies every activation there and back again. This is only
    called under `vmap`, whose rule is made of torch's own operations, so it has no backward pass of its own.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, int]:
        models: int = info.batch_size
        x = _at(x, in_dims[0], 1, models)
        scale, shift = (_at(p, dim, 0, models).flatten() for p, dim in ((weight, in_dims[1]), (bias, in_dims[2])))
        out = F.group_norm(x.flatten(1, 2), models * groups, scale, shift, eps)
        return out.view(len(out), models, -1, *out.shape[2:]), 1


def _at(x: Tensor, found: int | None, wanted: int, models: int) -> Tensor:
    """With the axis of the models at a place of its own."""
    if found is None:
        x = x.unsqueeze(wanted)
        return x.expand(*x.shape[:wanted], models, *x.shape[wanted + 1 :])
    return x.movedim(found, wanted)


@contextmanager
def side_by_side(model: nn.Module) -> Iterator[None]:
    """Let the group normalisations of a model keep the layout of convolutions, within `vmap`."""
    norms = [module for module in model.modules() if type(module) is nn.GroupNorm and module.affine]

    def forward(module: nn.GroupNorm, x: Tensor) -> Tensor:
        out: Tensor = _GroupNorm.apply(x, module.weight, module.bias, module.num_groups, module.eps)  # type: ignore[no-untyped-call]
        return out

    for module in norms:
        module.forward = partial(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in norms:
            del module.forward
