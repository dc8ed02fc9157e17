"""Random words from ChaCha20: for masks, and for rounding and noise that an observer must not be able to guess."""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedssl.errors import ProtocolError

KEY_BYTES = 32


def words(key: bytes, count: int, bits: int) -> np.ndarray:
    """(count,) uint32 or uint64, uniform: the first words of the key's stream, the same on every machine.

    Args:
        key: 32 bytes, used for one stream only.
        count: at least 0.
        bits: 32 or 64.
    """
    return Stream(key).words(count, bits)


class Stream:
    """A stream of random words from one key.

    Unlike numpy's generators it is cryptographically secure: who sees part of it cannot tell the rest.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ProtocolError(f"a ChaCha20 key of {len(key)} bytes was given and it has {KEY_BYTES}: derive one")
        # The nonce is fixed because no key serves twice.
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    @classmethod
    def of(cls, *path: str | int) -> Stream:
        """The stream of a seed and a path, as `fedssl.seeds.stream`: reproducible, and no secret."""
        return cls(hashlib.sha256(repr(("chacha20", *path)).encode()).digest())

    @classmethod
    def from_system(cls) -> Stream:
        """A stream that nobody can repeat, keyed by the operating system."""
        return cls(os.urandom(KEY_BYTES))

    def words(self, count: int, bits: int = 64) -> np.ndarray:
        """(count,) the next words: uint32 or uint64, uniform."""
        return np.frombuffer(self._cipher.update(bytes(count * bits // 8)), dtype=f"<u{bits // 8}")

    def below(self, bound: int, count: int) -> np.ndarray:
        """(count,) int64, uniform in 0 .. bound - 1 without bias, by rejection; `bound` in [1, 2**63]."""
        mask = np.uint64((1 << (bound - 1).bit_length()) - 1)
        out = self.words(count) & mask
        wrong = np.flatnonzero(out >= np.uint64(bound))
        while wrong.size:
            drawn = self.words(wrong.size) & mask
            good = drawn < np.uint64(bound)
            out[wrong[good]] = drawn[good]
            wrong = wrong[~good]
        return out.astype(np.int64)

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float64 in [0, 1): whole multiples of 2**-53."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
