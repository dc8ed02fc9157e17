"""Streams of random numbers named by (seed, path): never by order, never from a global generator."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, *path: str | int) -> int:
    """A 63-bit integer that depends on the seed and on every step of the path.

    Equal paths give equal keys on every machine; `("a", 1)` and `("a1",)` differ.
    """
    text = repr((int(seed), *(step if isinstance(step, str) else int(step) for step in path))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """A numpy generator of its own for this path, e.g. `stream(0, "client", 3, "round", 7, "order")`."""
    return np.random.Generator(np.random.PCG64(key(seed, *path)))


def torch_stream(seed: int, *path: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator of its own for this path, on `device`.

    CPU and GPU generators differ in their numbers: equal bits are promised for equal devices only.
    """
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(key(seed, *path))
    return generator
