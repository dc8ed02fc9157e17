"""Numbers that a computation on the device needs at every step: copied there once, for a copy waits for the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Numbers = tuple[float, ...] | tuple["Numbers", ...]


def constant(values: Numbers, like: Tensor) -> Tensor:
    """Numbers, nested as in `torch.tensor`, with the type and on the device of `like`; never to be changed in place."""
    return _constant(values, like.dtype, like.device)


def centres(count: int, like: Tensor) -> Tensor:
    """(count,) the middles of as many equal parts of [-1, 1]: where pixels lie; never to be changed in place."""
    return _constant(_middles(count), like.dtype, like.device)


@cache
def _middles(count: int) -> tuple[float, ...]:
    return tuple((2 * i + 1) / count - 1 for i in range(count))


@cache
def _constant(values: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, others may differentiate with it
        return torch.tensor(values, dtype=dtype, device=device)
