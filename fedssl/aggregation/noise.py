"""Gaussian noise that is never used twice: from the run's seed, or from the operating system."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedssl import seeds
from fedssl.privacy.noise import secure_normal


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
            return secure_normal(math.prod(shape)).reshape(shape)
        return np.asarray(seeds.stream(self.seed, "aggregation", *path).standard_normal(shape))
