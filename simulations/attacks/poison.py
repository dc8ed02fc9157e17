"""What a client that lies about its training sends instead: a change of the model for a change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedssl import seeds
from fedssl.job import Job
from fedssl.parts import Arrays


@dataclass(frozen=True)
class Turn:
    """What the liar knows: everything that an honest client does."""

    job: Job
    client: int
    round: int
    start: Arrays  # the server's model
    rng: np.random.Generator  # its own stream


class Attack(Protocol):
    """A frozen dataclass; its fields are its strength."""

    def poison(self, change: Arrays, turn: Turn) -> Arrays:
        """The change to send instead of an honest one (trained minus received, by name; counters are not in it)."""
        ...


@dataclass(frozen=True)
class SignFlip:
    """The honest change, backwards and stretched."""

    scale: float = 3.0

    def poison(self, change: Arrays, turn: Turn) -> Arrays:
        """See `Attack`."""
        return {key: -self.scale * value for key, value in change.items()}


@dataclass(frozen=True)
class Noise:
    """Gaussian noise `scale` times as long as the honest change, instead of it."""

    scale: float = 3.0

    def poison(self, change: Arrays, turn: Turn) -> Arrays:
        """See `Attack`."""
        size = sum(value.size for value in change.values())
        length = math.sqrt(math.fsum(float(np.sum(np.square(value))) for value in change.values()))
        deviation = self.scale * length / math.sqrt(size)
        return {key: turn.rng.normal(0.0, deviation, value.shape) for key, value in change.items()}


@dataclass(frozen=True)
class Replacement:
    """Model replacement: towards a model of random weights that all liars know, so far that a mean arrives there.

    References:
        Bagdasaryan et al. 2020, https://arxiv.org/abs/1807.00459, section 4.2
    """

    scale: float = 6.0  # clients over liars: together with honest changes of nothing, the mean is the whole way

    def poison(self, change: Arrays, turn: Turn) -> Arrays:
        """See `Attack`."""
        rng = seeds.stream(turn.job.seed, "attack", "goal")
        goal = {key: rng.normal(0.0, float(turn.start[key].std()) + 1e-3, change[key].shape) for key in sorted(change)}
        return {key: self.scale * (goal[key] - turn.start[key]) for key in change}
