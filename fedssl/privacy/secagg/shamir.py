"""Shamir's secret sharing of a 16-byte seed, by pycryptodome, over the field of 2**128 elements."""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from fedssl.errors import ProtocolError

SECRET_BYTES = 16  # an element of the field; the seeds are that long so that one polynomial shares one seed


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """One share of 16 bytes for each holder; any `threshold` of them give the secret, fewer say nothing about it.

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
    return [share for _, share in Shamir.split(threshold, holders, secret, ssss=False)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret behind at least `threshold` shares.

    A changed share gives another secret and no error: check the result against what is known of it.

    Args:
        shares: by position of the holder, from 0, in the list that `split` gave.
        threshold: the one that the secret was split with.

    Raises:
        ProtocolError: too few shares, or one of another size.
    """
    if len(shares) < threshold or any(len(share) != SECRET_BYTES for share in shares.values()):
        raise ProtocolError(
            f"{len(shares)} shares of a secret were given, of which {threshold} of {SECRET_BYTES} bytes are needed: "
            "more clients have to answer"
        )
    chosen = sorted(shares)[:threshold]  # exactly so many, or the polynomial is another
    secret: bytes = Shamir.combine([(position + 1, shares[position]) for position in chosen], ssss=False)
    return secret
