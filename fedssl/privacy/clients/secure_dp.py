"""Secure aggregation with noise from the clients: differential privacy by client, and nobody trusted with an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from fedssl.aggregation import claims
from fedssl.aggregation.base import Planned, Sender
from fedssl.errors import ConfigError
from fedssl.privacy.clients.secure import rounding
from fedssl.privacy.ledger import Entry
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.hidden import Hidden
from fedssl.privacy.secagg.noise.noisy import Noisy
from fedssl.privacy.statement import Declared

_NOT_COVERED = (
    "a server that does not follow the protocol, or that invents clients",
    "clients that tell the server their noise: the rest of the clients have less together",
)


@dataclass(frozen=True)
class SecureDP(Hidden):
    """Each client clips its change and adds discrete Gaussian noise; a sum is as private as the fewest noises make it.

    Neighbours differ in one client's change, replaced by zeros; who takes part is no secret. The adversary is the
    server, and all who see the model. A round is 1 / (2 noise_multiplier^2)-zero-concentrated, by the theorem of
    Kairouz et al. 2021 (https://arxiv.org/abs/2102.06387); rounds add up, and epsilon follows from the sum.

    Attributes:
        clip: L2 norm to which a client's whole change is shortened.
        noise_multiplier: standard deviation of the noise in the sum of the fewest clients, over how far one client can
            move that sum.
        delta: at which epsilon is given.
        secure: rounding and noise from the operating system, for deployments: the server knows the run's seed. Nothing
            repeats then. Keys and masks are always the system's.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    secure: bool = False
    counters: ClassVar[bool] = False  # noise would make them worthless

    def __post_init__(self) -> None:
        super().__post_init__()
        claims.check_noise(self.noise_multiplier, None, self.clip)
        claims.delta_of(self.delta, 1)

    def mechanism(self, clients: int, size: int) -> Noisy:
        """The mechanism of a round with so many clients and so many numbers.

        Raises:
            ConfigError: no room for the noise, or it is so coarse on the grid that it costs more than a Gaussian.
        """
        return _mechanism(self, clients, size)

    def grid(self, clients: int, size: int) -> FixedPoint:
        """See `Hidden`."""
        return self.mechanism(clients, size).grid

    def encode(self, values: np.ndarray, clients: int, sender: Sender) -> np.ndarray:
        """Clipped, rounded, with this client's share of the noise."""
        stream = Stream.from_system() if self.secure else rounding(sender)
        return self.mechanism(clients, values.size).encode(values, stream)

    def entry(self, plan: Planned, at: int, attempt: int) -> Entry:
        """A sum without sampling, for the server knows who takes part; of its noise only the concentration is known."""
        count = 1 if plan.participation.plan(plan.clients, at, plan.seed).arriving else 0
        return Entry(at, attempt, "sum of updates", self.noise_multiplier, 1.0, count, concentrated=True)

    def budget(self, plan: Planned) -> tuple[float | None, float]:
        """No limit, and the delta."""
        return None, self.delta

    def declaration(self, plan: Planned) -> Declared:
        """See `Private`."""
        claimed = claims.declare(
            "the server, which follows the protocol, and all who see the model",
            "zero_out",
            "every sum sees all of a round's clients: no amplification is claimed",
            "the sum of each round's clipped updates with discrete Gaussian noise, by secure aggregation",
            self.secure,
            self.budget(plan),
        )
        return replace(claimed, public=(*claimed.public, *_NOT_COVERED))

    def remarks(self, plan: Planned, size: int) -> Sequence[str]:
        """How long the noise is."""
        clients = len(plan.participation.plan(plan.clients, 1, plan.seed).turns)
        if clients < 2:
            return ()
        used = self.mechanism(clients, size)
        length = used.deviation * used.grid.step * math.sqrt(size / clients)
        return (
            f"with {clients} clients the noise on the mean has the length {length:.3g}, where a client's update has at "
            f"most {self.clip:g}",
        )


@lru_cache(maxsize=64)
def _mechanism(options: SecureDP, clients: int, size: int) -> Noisy:
    fewest = options.fewest(clients)
    found = Noisy.fit(options.clip, options.noise_multiplier, size, clients, fewest, options.bits)
    if found.rho > 1 / (2 * options.noise_multiplier**2):
        raise ConfigError(
            f"noise of {found.deviation} steps for each of {clients} clients is so coarse that it costs more than is "
            "accounted for: use aggregation.bits=64, fewer clients a round, or a larger noise_multiplier"
        )
    return found
