"""The options of secure aggregation, and what follows from them: thresholds, grids, vectors, epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedssl import tree
from fedssl.errors import ConfigError, PrivacyError
from fedssl.parts import Arrays
from fedssl.privacy.secagg import accounting
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.noisy import Noisy

NUMBERS = ("drift", "feature_std", "loss")  # scalars of a client of which the server learns the mean
_NUMBER_SCALE = 2.0**-10  # so that a loss of a thousand limits fits


@dataclass(frozen=True)
class SecureAggregation:
    """The server learns the mean of a round's updates, each client counted once, and nothing else of any of them.

    What a client sends is its change of the server's model, in whole steps of a grid, hidden by masks that cancel in
    the sum (Bonawitz et al. 2017, https://eprint.iacr.org/2017/281). With `noise_multiplier` every client clips its
    change and adds discrete Gaussian noise, so that the sum is differentially private by client although nobody is
    trusted with the updates (Kairouz et al. 2021, https://arxiv.org/abs/2102.06387).

    Attributes:
        threshold: share of a round's clients that must not drop out, above 1/2; fewer reveal nothing.
        limit: the largest change of one number that can be sent; a larger one is an error, never cut.
        bits: of a number on the wire, 32 or 64; the step of the grid follows from it, the limit and the clients.
        clip_norm: L2 norm of a client's whole change, where there is noise; it takes the place of `limit`.
        noise_multiplier: deviation of the noise in the sum of the fewest clients, over how far one client can move
            that sum; 0: none, and no epsilon.
        delta: at which epsilon is given.
        randomness: of rounding and noise: `seed`, the run's, so that a simulation can be repeated, or `system`, the
            operating system's, as privacy against the server needs. Keys and masks are always the system's.
    """

    threshold: float = 0.7
    limit: float = 8.0
    bits: int = 32
    clip_norm: float | None = None
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    randomness: str = "seed"

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise ConfigError(
                f"aggregation.threshold={self.threshold} is refused, since two halves of the clients could be told "
                "different survivors: give a share above 0.5, at most 1"
            )
        if not (0 < self.limit < math.inf and self.bits in (32, 64)):
            raise ConfigError(
                f"aggregation.limit={self.limit} and aggregation.bits={self.bits} make no grid: give a positive limit, "
                "and 32 or 64 bits"
            )
        if not (0 <= self.noise_multiplier < math.inf and 0 < self.delta < 1):
            raise ConfigError(
                f"aggregation.noise_multiplier={self.noise_multiplier} and aggregation.delta={self.delta} give no "
                "epsilon: use a multiplier of at least 0 and a delta in (0, 1)"
            )
        if (self.clip_norm is not None) != bool(self.noise_multiplier) or not (self.clip_norm or 1) > 0:
            raise ConfigError(
                f"aggregation.clip_norm={self.clip_norm} with aggregation.noise_multiplier={self.noise_multiplier}: "
                "noise needs a positive norm to be measured by, and without noise nothing is clipped; give both or none"
            )
        if self.randomness not in ("seed", "system"):
            raise ConfigError(f"aggregation.randomness={self.randomness!r} is unknown: use seed or system")

    def fewest(self, asked: int) -> int:
        """How many of so many clients must survive.

        Raises:
            ConfigError: one client's sum is its own vector.
        """
        if asked < 2:
            raise ConfigError(
                f"secure aggregation of {asked} client hides nothing: let more take part in each round, or use "
                "aggregation=plain"
            )
        return max(2, math.floor(asked / 2) + 1, math.ceil(self.threshold * asked - 1e-9))

    def stream(self, seed: int, client: int, at: int) -> Stream:
        """The random words of a client's round."""
        own = Stream.of(seed, "client", client, "round", at, "secagg")
        return own if self.randomness == "seed" else Stream.from_system()

    def encode(
        self, trained: Arrays, now: Arrays, numbers: Mapping[str, float], asked: int, stream: Stream
    ) -> np.ndarray:
        """(d,) uint32 or uint64: a client's change, and behind it its `NUMBERS` if there is no noise.

        Args:
            trained: what the client has to say.
            now: the values that it received.
            numbers: its scalars.
            asked: clients of the round.
            stream: see `stream`.

        Raises:
            ProtocolError: a change that is too large, or not finite.
            PrivacyError: see `layout`.
        """
        keys, size = self.layout(trained)
        coding = self._coding(asked, size)
        step = _grid(coding).step
        changes = [_change(trained[key], now[key], step).ravel() for key in keys]
        if not self.noise_multiplier:
            changes.append(np.array([numbers[name] for name in NUMBERS]) * _NUMBER_SCALE)
        return coding.encode(np.concatenate(changes), stream)

    def decode(self, total: np.ndarray, now: Arrays, asked: int, survivors: int) -> tuple[Arrays, dict[str, float]]:
        """The mean of what the survivors have trained, in the types of `now`, and the means of their numbers."""
        keys, size = self.layout(now)
        grid = _grid(self._coding(asked, size))
        mean = grid.mean(total, survivors)
        out, place = {}, 0
        for key in keys:
            value, change = now[key], mean[place : place + now[key].size].reshape(now[key].shape)
            out[key] = value.astype(np.float64) + (change if _floating(value) else change / grid.step)
            place += value.size
        told = dict(zip(NUMBERS, (mean[place:] / _NUMBER_SCALE).tolist(), strict=False))
        return tree.like(out, now), told

    def layout(self, arrays: Mapping[str, np.ndarray]) -> tuple[list[str], int]:
        """The names in the order of the vector, and how many entries it has.

        Raises:
            PrivacyError: whole numbers among them where there is noise.
        """
        whole = [key for key, value in sorted(arrays.items()) if not _floating(value)]
        if whole and self.noise_multiplier:
            raise PrivacyError(
                f"{whole[0]!r} counts in whole numbers, which noise would make worthless: use norm=group or norm=layer "
                "in the encoder and the method, or keep its part local"
            )
        numbers = 0 if self.noise_multiplier else len(NUMBERS)
        return sorted(arrays), sum(value.size for value in arrays.values()) + numbers

    def rho(self, asked: int, size: int) -> float:
        """What one round costs in zero-concentrated differential privacy; infinite without noise."""
        coding = self._coding(asked, size)
        return coding.rho if isinstance(coding, Noisy) else math.inf

    def epsilon(self, rho: float) -> float | None:
        """The epsilon of rounds that cost so much together; none without noise: a hidden sum is no guarantee."""
        return accounting.epsilon(rho, self.delta) if self.noise_multiplier else None

    def _coding(self, asked: int, size: int) -> FixedPoint | Noisy:
        return _fit(self, asked, size)


@lru_cache(maxsize=64)
def _fit(options: SecureAggregation, asked: int, size: int) -> FixedPoint | Noisy:
    if options.clip_norm is None:
        return FixedPoint.fit(options.limit, asked, options.bits)
    fewest = options.fewest(asked)
    return Noisy.fit(options.clip_norm, options.noise_multiplier, size, asked, fewest, options.bits)


def _grid(coding: FixedPoint | Noisy) -> FixedPoint:
    return coding.grid if isinstance(coding, Noisy) else coding


def _floating(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating)


def _change(trained: np.ndarray, now: np.ndarray, step: float) -> np.ndarray:
    """A difference in float64; whole numbers count in steps, so they arrive exactly."""
    change = trained.astype(np.float64) - now.astype(np.float64)
    return change if _floating(now) else change * step
