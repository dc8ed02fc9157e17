"""Secure aggregation with noise from the clients: differential privacy by client, and nobody trusted with an update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedssl.aggregation.base import Memory, Sender
from fedssl.aggregation.hidden import Hidden
from fedssl.aggregation.secure import rounding
from fedssl.errors import ConfigError, PrivacyError
from fedssl.privacy.secagg import accounting
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.noisy import Noisy

_SPENT = "rho"  # in the memory: zero-concentrated differential privacy of all rounds so far


@dataclass(frozen=True)
class SecureDP(Hidden):
    """Each client clips its change and adds discrete Gaussian noise; a sum is as private as the fewest noises make it.

    Neighbours differ in one client's change, replaced by zeros; who takes part is no secret. The adversary is the
    server, and all who see the model (Kairouz et al. 2021, https://arxiv.org/abs/2102.06387).

    Attributes:
        clip: L2 norm of a client's whole change.
        noise_multiplier: deviation of the noise in the sum of the fewest clients, over how far one client can move
            that sum.
        delta: at which epsilon is given.
        randomness: of rounding and noise: `seed`, the run's, so that a simulation can be repeated, or `system`, the
            operating system's: the server knows the seed. Keys and masks are always the system's.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    randomness: str = "seed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.clip < math.inf and 0 < self.noise_multiplier < math.inf and 0 < self.delta < 1):
            raise ConfigError(
                f"aggregation.clip={self.clip}, noise_multiplier={self.noise_multiplier} and delta="
                f"{self.delta} give no epsilon: use a positive norm, a positive multiplier and a delta in (0, 1); "
                "without noise it is aggregation=secure"
            )
        if self.randomness not in ("seed", "system"):
            raise ConfigError(f"aggregation.randomness={self.randomness!r} is unknown: use seed or system")

    def mechanism(self, clients: int, size: int) -> Noisy:
        """The mechanism of a round with so many clients."""
        return _mechanism(self, clients, size)

    def grid(self, clients: int, size: int) -> FixedPoint:
        """See `Hidden`."""
        return self.mechanism(clients, size).grid

    def encode(self, values: np.ndarray, clients: int, sender: Sender) -> np.ndarray:
        """Clipped, rounded, with this client's share of the noise."""
        stream = rounding(sender) if self.randomness == "seed" else Stream.from_system()
        return self.mechanism(clients, values.size).encode(values, stream)

    def account(self, asked: Mapping[str, np.ndarray], clients: int, memory: Memory) -> tuple[Memory, dict[str, float]]:
        """Add a round's cost for the fewest clients whose sum is opened.

        Raises:
            PrivacyError: whole numbers are among the arrays.
        """
        whole = [key for key, value in sorted(asked.items()) if not np.issubdtype(value.dtype, np.floating)]
        if whole:
            raise PrivacyError(
                f"{whole[0]!r} counts in whole numbers, which noise makes worthless: use encoder.norm=group and "
                "method.norm=layer, or keep that part local"
            )
        rho = self.mechanism(clients, sum(value.size for value in asked.values())).rho
        spent = memory.numbers.get(_SPENT, 0.0) + rho
        return Memory(memory.arrays, {**memory.numbers, _SPENT: spent}), {"epsilon": self.epsilon(spent)}

    def epsilon(self, rho: float) -> float:
        """The epsilon of rounds that cost so much together."""
        return accounting.epsilon(rho, self.delta)


@lru_cache(maxsize=64)
def _mechanism(options: SecureDP, clients: int, size: int) -> Noisy:
    fewest = options.fewest(clients)
    return Noisy.fit(options.clip, options.noise_multiplier, size, clients, fewest, options.bits)
