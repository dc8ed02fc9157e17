"""Similarity of embeddings, and in which precision it is computed: shared by losses and temperature rules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from fedssl.errors import ConfigError

_TINY_NORM = 1e-12  # a vector shorter than this has no direction


def wide(x: Tensor) -> Tensor:
    """The same values in at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Rows at length 1, shape kept; a zero row stays zero and its gradient stays finite and of usual size."""
    x = wide(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > _TINY_NORM, norm, 1.0)


def ready_for(similarity: str) -> Callable[[Tensor], Tensor]:
    """What to do with embeddings so that their inner product is the similarity, "cosine" or "dot".

    Raises:
        ConfigError: another name.
    """
    if similarity == "cosine":
        return unit
    if similarity == "dot":
        return wide
    raise ConfigError(f"The similarity {similarity!r} is not known; use 'cosine' or 'dot'.")


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the precision of its arguments, also under autocast."""
    device = a.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if on else contextlib.nullcontext():
        return a @ b


def cross_entropies(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of each row of logits (N, C) with its class (N,), as (N,): that of torch, bit for bit.

    Under `vmap` torch's own imports sympy, which takes as long as hundreds of the steps that it is called in.
    """
    return -torch.log_softmax(logits, dim=1).gather(1, classes[:, None])[:, 0]


def diagonal(matrix: Tensor) -> Tensor:
    """Where a square matrix (N, N) has its diagonal, as booleans."""
    return torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
