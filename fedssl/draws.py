"""Random numbers for the examples of a batch: from one stream, or from one stream for each client of a joint batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Streams:
    """The generators of several clients whose examples lie one after another in a joint batch.

    Each client's examples get the numbers that its generator would have given them in a batch of their own.

    Attributes:
        generators: one a client.
        counts: how many examples each has in the batch.
    """

    generators: Sequence[torch.Generator]
    counts: Sequence[int]


Source = torch.Generator | Streams


def uniform(shape: Sequence[int], axis: int, source: Source, like: Tensor) -> Tensor:
    """Numbers in [0, 1) of this shape, whose `axis` is the examples', with the type and on the device of `like`."""
    return _drawn(torch.rand, shape, axis, source, like)


def normal(shape: Sequence[int], axis: int, source: Source, like: Tensor) -> Tensor:
    """Numbers of the standard normal distribution; see `uniform`."""
    return _drawn(torch.randn, shape, axis, source, like)


def _drawn(draw: object, shape: Sequence[int], axis: int, source: Source, like: Tensor) -> Tensor:
    if isinstance(source, torch.Generator):
        drawn: Tensor = draw(tuple(shape), generator=source, device=source.device, dtype=like.dtype)  # type: ignore[operator]
        return drawn.to(like.device)
    parts = zip(source.generators, source.counts, strict=True)
    own = [_drawn(draw, [*shape[:axis], count, *shape[axis + 1 :]], axis, each, like) for each, count in parts]
    return torch.cat(own, axis)
