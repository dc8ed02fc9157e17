"""Poisson samples of a client's records: what the accounting assumes, and what really runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def rate(batch_size: int, n: int) -> float:
    """The probability with which each of n records is in a batch of this expected size, in (0, 1]."""
    return min(1.0, batch_size / n)


def steps(sample_rate: float, epochs: int) -> int:
    """How many batches see each record `epochs` times in expectation."""
    return epochs * max(1, round(1 / sample_rate))


def poisson(n: int, sample_rate: float, count: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """`count` batches into which each of n records comes independently; some may be empty, and are yielded too."""
    for _ in range(count):
        yield torch.from_numpy(np.flatnonzero(rng.random(n) < sample_rate))
