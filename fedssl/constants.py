"""Numbers that a computation on the device needs at every step: copied there once, for a copy waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def constant(values: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers, nested as in `torch.tensor`, with the type and on the device of `like`; never to be changed in place."""
    return _constant(_frozen(values), like.dtype, like.device)


def centres(count: int, like: Tensor) -> Tensor:
    """(count,) the middles of as many equal parts of [-1, 1]: where pixels lie; never to be changed in place."""
    return _constant(tuple((2 * i + 1) / count - 1 for i in range(count)), like.dtype, like.device)


@cache
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, others may differentiate with it
        return torch.tensor(values, dtype=dtype, device=device)


def _frozen(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_frozen(value) if isinstance(value, Sequence) else value for value in values)
