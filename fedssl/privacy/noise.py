"""Gaussian noise whose stream is never used twice: seeded for simulations, from the operating system for real use."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


class Noise:
    """Normal values for one step; each call goes on in the stream, so no two tensors share any.

    Args:
        rng: gives the step's seed. The caller's stream is named by run, client, round, attempt, and advances with
            every step.
        secure: whether the values come from the operating system's generator instead: then nothing is reproducible,
            and nobody who knows the seed of the run can take the noise off.
        device: where the values are needed.
    """

    def __init__(self, rng: np.random.Generator, secure: bool, device: torch.device) -> None:
        self.secure, self.device = secure, device
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(int(rng.integers(2**63)))

    def like(self, value: Tensor, deviation: float) -> Tensor:
        """Independent normal values of this standard deviation, in the shape, type and place of `value`."""
        if not self.secure:
            drawn = torch.randn(value.shape, generator=self._generator, device=self.device, dtype=value.dtype)
            return drawn * deviation
        return torch.from_numpy(secure_normal(value.numel())).to(value).view(value.shape) * deviation


def secure_normal(count: int) -> np.ndarray:
    """(count,) float64 standard normal values from the operating system's generator.

    Each is half the sum of four, which is normal, too, and leaves no trace of how floating-point numbers are spaced:
    Holohan & Braghin 2021, https://arxiv.org/abs/2107.10138.
    """
    total: np.ndarray = sum((_box_muller(count) for _ in range(4)), np.zeros(count)) / 2
    return total


def _box_muller(count: int) -> np.ndarray:
    words = np.frombuffer(os.urandom(16 * count), dtype=np.uint64).reshape(2, count)
    first, second = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    values: np.ndarray = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    return values


def secure_rng() -> np.random.Generator:
    """A generator seeded with 256 bits of the operating system's, for which records a step sees."""
    return np.random.default_rng(int.from_bytes(os.urandom(32), "big"))
