"""Gaussian noise that is never used twice: from the run's seed, or from the operating system."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

from fedssl import seeds


@dataclass(frozen=True)
class Noise:
    """Where noise comes from.

    Attributes:
        seed: of the run. Who knows it can subtract the noise: it serves simulations, which repeat bit for bit.
        secure: take it from the operating system instead; then nothing repeats.
    """

    seed: int
    secure: bool = False

    def normal(self, shape: tuple[int, ...], *path: str | int) -> np.ndarray:
        """Standard normal values, float64.

        Args:
            shape: of the array.
            path: of the stream, such as round, attempt and name of the array: equal paths give equal values.
        """
        if self.secure:
            return _from_system(math.prod(shape)).reshape(shape)
        return np.asarray(seeds.stream(self.seed, "aggregation", *path).standard_normal(shape))


def _from_system(size: int) -> np.ndarray:
    """Box and Muller's transform of uniform values with 53 random bits, the first of each pair in (0, 1]."""
    pairs = (size + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), np.uint64) >> np.uint64(11)
    uniform = bits.astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
