"""Clip, round, add a share of the noise: what a client does so that the sum is differentially private."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedssl.errors import ConfigError, ProtocolError
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.noise import accounting, discrete_gaussian

_SLACK = 1 + 1e-9  # what float64 may add to a norm


@dataclass(frozen=True)
class Noisy:
    """The distributed discrete Gaussian mechanism (Kairouz et al. 2021, https://arxiv.org/abs/2102.06387).

    Every client adds noise of `deviation` steps, so large that the noise of the fewest clients whose sum is ever opened
    is as wanted; more survivors bring more noise than that.

    Attributes:
        grid: of the residues.
        clip: L2 norm to which a client's vector is scaled down.
        dim: entries of the vector.
        deviation: of one client's noise, in steps: a whole number.
        fewest: honest clients whose noise is in every opened sum.
    """

    grid: FixedPoint
    clip: float
    dim: int
    deviation: int
    fewest: int

    @classmethod
    def fit(cls, clip: float, multiplier: float, dim: int, clients: int, fewest: int, bits: int) -> Noisy:
        """The mechanism for at most `clients` clients.

        Args:
            clip: positive.
            multiplier: deviation of the fewest clients' noise, over the norm of a clipped and rounded vector.
            dim: entries of the vector, at least 1.
            clients: all who may take part.
            fewest: see `Noisy`.
            bits: of a residue, 32 or 64.

        Raises:
            ConfigError: a number out of its range, or no room for the noise.
        """
        if not (0 < clip < math.inf and 0 < multiplier < math.inf and 1 <= fewest <= clients and dim >= 1):
            raise ConfigError(
                f"clip_norm={clip} with noise_multiplier={multiplier} over {fewest} of {clients} clients is no "
                "mechanism: give a positive norm and a positive multiplier"
            )

        def deviation(step: float) -> int:
            return math.ceil(multiplier * _norm(clip / step, dim) / math.sqrt(fewest) * _SLACK)

        grid = FixedPoint.fit(clip, clients, bits, deviation)
        return cls(grid, clip, dim, deviation(grid.step), fewest)

    @property
    def norm(self) -> float:
        """The L2 norm, in steps, that a client's rounded vector can have: how far a client moves the sum."""
        return _norm(self.clip / self.grid.step, self.dim)

    @property
    def rho(self) -> float:
        """What one sum costs, in zero-concentrated differential privacy."""
        return accounting.concentrated(self.norm, self.deviation, self.fewest, self.dim)

    def encode(self, values: np.ndarray, stream: Stream) -> np.ndarray:
        """(d,) uint32 or uint64: clipped, rounded and noisy residues.

        Args:
            values: (d,) float64.
            stream: of random words; the guarantee is against those who do not know them.

        Raises:
            ProtocolError: a value that is not finite.
        """
        length = float(np.sqrt((values * values).sum()))
        if not math.isfinite(length):
            raise ProtocolError("an update is not finite, so it has no norm to clip: its training diverged")
        clipped = values * min(1.0, self.clip / (length * _SLACK)) if length else values
        while True:  # until the rounding is no longer than promised: at least 4 tries in 10 are
            rounded = self.grid.round(clipped, stream)
            if float(np.sqrt((rounded.astype(np.float64) ** 2).sum())) <= self.norm:
                break
        return self.grid.residues(rounded + discrete_gaussian.draw(self.deviation, self.dim, stream))


def _norm(norm: float, dim: int) -> float:
    return accounting.rounded_norm(norm * _SLACK, dim) * _SLACK
