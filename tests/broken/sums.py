"""Noisy sums of gradients (n, D) -> (D,): the sound one, and those that look like it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from broken.rows import clipped

Mechanism = Callable[[Tensor, np.random.Generator], Tensor]


def gaussian(noise_multiplier: float, bound: float = 1.0) -> Mechanism:
    """Sound: each record's gradient clipped, then noise of `noise_multiplier` times the bound."""

    def mechanism(gradients: Tensor, rng: np.random.Generator) -> Tensor:
        noise = torch.from_numpy(rng.standard_normal(gradients.shape[1]))
        return clipped(gradients, bound).sum(0) + noise_multiplier * bound * noise

    return mechanism


def sampled(noise_multiplier: float, rate: float, bound: float = 1.0) -> Mechanism:
    """Sound: as `gaussian`, of a Poisson sample of the records."""
    inner = gaussian(noise_multiplier, bound)

    def mechanism(gradients: Tensor, rng: np.random.Generator) -> Tensor:
        return inner(gradients[torch.from_numpy(rng.random(len(gradients)) < rate)], rng)

    return mechanism


def per_view(noise_multiplier: float, views: int = 2, bound: float = 1.0) -> Mechanism:
    """Broken: the views of a record are clipped one by one, so that a record moves the sum by `views` bounds."""
    inner = gaussian(noise_multiplier, bound)
    return lambda gradients, rng: inner((gradients / views).repeat_interleave(views, 0), rng)


def shared_noise(noise_multiplier: float, bound: float = 1.0) -> Mechanism:
    """Broken: two tensors of one shape draw their noise from streams of the same seed, so it is the same noise."""

    def mechanism(gradients: Tensor, rng: np.random.Generator) -> Tensor:
        noise = torch.from_numpy(rng.standard_normal(gradients.shape[1] // 2))
        return clipped(gradients, bound).sum(0) + noise_multiplier * bound * torch.cat((noise, noise))

    return mechanism


def twin_clients(noise_multiplier: float, bound: float = 1.0) -> Mechanism:
    """Broken: two clients seeded alike. The record is with the first, the second has none: (D,) and (D,) come out."""

    def mechanism(gradients: Tensor, rng: np.random.Generator) -> Tensor:
        noise = noise_multiplier * bound * torch.from_numpy(rng.standard_normal(gradients.shape[1]))
        return torch.cat((clipped(gradients, bound).sum(0) + noise, noise))

    return mechanism


def unclipped_scalar(noise_multiplier: float, bound: float = 1.0) -> Mechanism:
    """Broken: the last coordinate is a tensor of shape (), which arithmetic in place on arrays does not clip."""

    def mechanism(gradients: Tensor, rng: np.random.Generator) -> Tensor:
        noise = torch.from_numpy(rng.standard_normal(gradients.shape[1]))
        kept = torch.cat((clipped(gradients[:, :-1], bound), gradients[:, -1:]), 1)
        return kept.sum(0) + noise_multiplier * bound * noise

    return mechanism


def many_rounds(one: Mechanism, rounds: int) -> Mechanism:
    """The sum of so many rounds. Sound if their cost is added up; broken where the accountant is reset each round."""
    return lambda gradients, rng: torch.stack([one(gradients, rng) for _ in range(rounds)]).sum(0)
