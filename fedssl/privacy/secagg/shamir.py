"""Shamir's secret sharing of a 16-byte seed over the integers modulo a prime."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedssl.errors import ProtocolError

SECRET_BYTES = 16  # the seeds are that long so that one polynomial shares one seed
SHARE_BYTES = 17
_PRIME = 2**130 - 5  # the first above 2**128 that is known by name, from Poly1305


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """One share of 17 bytes for each holder; any `threshold` of them give the secret, fewer say nothing about it.

    The shares are the values at 1, 2, ... of a polynomial whose value at 0 is the secret and whose other coefficients
    come from the operating system.

    Args:
        secret: 16 bytes.
        threshold: at least 2.
        holders: at least `threshold`.

    Raises:
        ProtocolError: a number out of its range.

    References:
        Shamir 1979, https://doi.org/10.1145/359168.359176
    """
    if len(secret) != SECRET_BYTES or not 2 <= threshold <= holders:
        raise ProtocolError(
            f"a secret of {len(secret)} bytes cannot be split for {holders} holders of whom {threshold} recover it: "
            f"give {SECRET_BYTES} bytes and a threshold from 2 to the number of holders"
        )
    coefficients = [secrets.randbelow(_PRIME) for _ in range(threshold - 1)]  # from the highest down
    coefficients.append(int.from_bytes(secret, "little"))
    shares = []
    for at in range(1, holders + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * at + coefficient) % _PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret behind at least `threshold` shares.

    A changed share gives another secret, or an error: check the result against what is known of it.

    Args:
        shares: by position of the holder, from 0, in the list that `split` gave.
        threshold: the one that the secret was split with.

    Raises:
        ProtocolError: too few shares, or one of another size.
    """
    if len(shares) < threshold or any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ProtocolError(
            f"{len(shares)} shares of a secret were given, of which {threshold} of {SHARE_BYTES} bytes are needed: "
            "more clients have to answer"
        )
    chosen = tuple(sorted(shares)[:threshold])
    values = (int.from_bytes(shares[position], "little") for position in chosen)
    secret = sum(weight * value for weight, value in zip(_weights(chosen), values, strict=True)) % _PRIME
    if secret >> 8 * SECRET_BYTES:
        raise ProtocolError("the shares are of no secret, so one was changed: repeat the round")
    return secret.to_bytes(SECRET_BYTES, "little")


@lru_cache(maxsize=64)
def _weights(positions: tuple[int, ...]) -> tuple[int, ...]:
    """Of the values at these positions in the value at 0, by Lagrange."""
    points = [position + 1 for position in positions]
    whole = math.prod(points)
    below = (point * math.prod(other - point for other in points if other != point) for point in points)
    return tuple(whole * pow(one, -1, _PRIME) % _PRIME for one in below)
