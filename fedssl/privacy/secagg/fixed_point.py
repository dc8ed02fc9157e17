"""Real numbers as residues: a grid just so coarse that the sum of all clients cannot wrap, and a check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedssl.errors import ConfigError, ProtocolError
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.noise import discrete_gaussian

TAIL = 12  # deviations of noise for which there is room; one entry in 1e32 is beyond


@dataclass(frozen=True)
class FixedPoint:
    """Whole multiples of a power of two, modulo 2**bits.

    Attributes:
        step: the quantum, a power of two: a float divided by it loses nothing.
        largest: multiple, in absolute value, that one client may send; `clients * largest < 2**(bits - 1)`.
        bits: of a residue, 32 or 64.
        limit: real number, in absolute value, that one client may encode.
    """

    step: float
    largest: int
    bits: int
    limit: float

    @classmethod
    def fit(cls, limit: float, clients: int, bits: int, deviation: Callable[[float], int] | None = None) -> FixedPoint:
        """The finest grid on which `clients` numbers up to `limit` each, with their noise, can be added.

        Args:
            limit: positive.
            clients: all who may take part, at least 1.
            bits: 32 or 64.
            deviation: of the noise that each client adds, in steps, for a step.

        Raises:
            ConfigError: a number out of its range, or no room for so many clients.
        """
        if not (0 < limit < math.inf and clients >= 1 and bits in (32, 64)):
            raise ConfigError(
                f"limit={limit} for {clients} clients in {bits} bits makes no grid: give a positive limit, and 32 or 64"
            )
        room = (2 ** (bits - 1) - 1) // clients
        step = 2.0 ** math.ceil(math.log2(limit / max(room, 1)))
        while step <= limit:
            spread = deviation(step) if deviation else 0
            largest = math.ceil(limit / step) + 1 + TAIL * spread
            if largest <= room and spread <= discrete_gaussian.LARGEST:
                return cls(step, largest, bits, limit)
            step *= 2
        raise ConfigError(
            f"the sum of {clients} clients, with its noise, does not fit {bits} bits: use aggregation.bits=64, fewer "
            "clients a round, or less noise"
        )

    def round(self, values: np.ndarray, stream: Stream) -> np.ndarray:
        """(d,) int64: multiples of the step, rounded up or down at random so that the mean is the value.

        Args:
            values: (d,) float64.
            stream: of random words.

        Raises:
            ProtocolError: a value that is not finite, or beyond the limit; nothing is cut silently.
        """
        if not (np.abs(values) <= self.limit).all():  # also false for what is not a number
            # Neither the value nor its name: the server reads what a client's error says.
            raise ProtocolError(
                f"an update has a change that is not finite or larger than aggregation.limit={self.limit:g}, and a sum "
                "with it could wrap: raise the limit, at the price of a coarser step, or lower local.lr"
            )
        scaled = values / self.step
        low = np.floor(scaled)
        low += stream.uniform(values.size) < scaled - low
        return low.astype(np.int64)

    def residues(self, multiples: np.ndarray) -> np.ndarray:
        """(d,) uint32 or uint64: int64 multiples modulo 2**bits.

        Raises:
            ProtocolError: one is larger than a client may send.
        """
        if multiples.size and int(np.abs(multiples).max()) > self.largest:
            raise ProtocolError(
                f"an update has a multiple of the step larger than {self.largest}, with which a sum could wrap: raise "
                "aggregation.limit"
            )
        return multiples.astype(np.uint64).astype(f"u{self.bits // 8}")

    def encode(self, values: np.ndarray, stream: Stream) -> np.ndarray:
        """(d,) uint32 or uint64: values to residues; see `round`."""
        return self.residues(self.round(values, stream))

    def total(self, residues: np.ndarray) -> np.ndarray:
        """(d,) int64: the sum that the residues stand for, exact because it cannot have wrapped."""
        return residues.view(f"i{self.bits // 8}").astype(np.int64)

    def mean(self, residues: np.ndarray, clients: int) -> np.ndarray:
        """(d,) float64: the sum that the residues stand for, divided by the number of clients in it."""
        return self.total(residues) * (self.step / clients)
