"""Group normalisation of many models at once, in the memory layout that their convolutions leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

# Private: by an autograd.Function, torch's way to give `vmap` a rule, a small normalisation takes twice as long.
from torch._C._functorch import _add_batch_dim, _unwrap_batched, maybe_get_level


@contextmanager
def side_by_side(model: nn.Module) -> Iterator[None]:
    """Let the group normalisations of a model keep the layout of convolutions, within `vmap`.

    There K models' channels lie side by side, (B, K * C, ...), as a grouped convolution has put them. torch's own rule
    moves the models to the front, which copies every activation there and back again.
    """
    norms = [module for module in model.modules() if type(module) is nn.GroupNorm and module.affine]
    for module in norms:
        module.forward = partial(_normalised, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    level: int = maybe_get_level(x)
    own, found = _unwrap_batched(x, level)
    x = own.movedim(cast(int, found), 1)  # views are each client's own
    models = x.shape[1]
    scale, shift = (_rows(parameter, level, models).flatten() for parameter in (norm.weight, norm.bias))
    out = F.group_norm(x.flatten(1, 2), models * norm.num_groups, scale, shift, norm.eps)
    made: Tensor = _add_batch_dim(out.view(len(out), models, -1, *out.shape[2:]), 1, level)
    return made


def _rows(parameter: Tensor, level: int, models: int) -> Tensor:
    """(K, C) a parameter of all models."""
    own, found = _unwrap_batched(parameter, level)
    return own.expand(models, *own.shape) if found is None else own.movedim(found, 0)
