"""What two clients derive from each other's public keys: a mask between them, and sealed letters.

Key agreement is X25519 (RFC 7748), derivation HKDF with SHA-256 (RFC 5869), letters are ChaCha20-Poly1305 (RFC 8439),
all by the package `cryptography`. Each derivation is bound to the session and to what the key is for.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedssl.errors import ProtocolError

_NONCE_BYTES = 12


def derive(secret: bytes, *purpose: str | int | bytes) -> bytes:
    """32 bytes for one purpose; those for another purpose say nothing about them."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=repr(purpose).encode()).derive(secret)


def private_key(seed: bytes) -> X25519PrivateKey:
    """The key pair of a seed: any 32 bytes are a private key."""
    return X25519PrivateKey.from_private_bytes(derive(seed, "private key"))


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The 32 public bytes of a key pair."""
    return key.public_key().public_bytes_raw()


def agree(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    """The secret that two clients share: the same from either side.

    Raises:
        ProtocolError: the other's bytes are no public key.
    """
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise ProtocolError(
            "a client advertised bytes that are no X25519 key: it runs another protocol, leave it out of the round"
        ) from error


def seal(shared: bytes, session: bytes, sender: int, recipient: int, text: bytes) -> bytes:
    """A letter that only the recipient can read, and nobody can change unnoticed."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _cipher(shared, session, sender, recipient).encrypt(nonce, text, None)


def unseal(shared: bytes, session: bytes, sender: int, recipient: int, letter: bytes) -> bytes:
    """The text of a letter.

    Raises:
        ProtocolError: it was changed, or is from another sender, for another recipient or of another session.
    """
    try:
        nonce, sealed = letter[:_NONCE_BYTES], letter[_NONCE_BYTES:]
        return _cipher(shared, session, sender, recipient).decrypt(nonce, sealed, None)
    except (InvalidTag, ValueError) as error:
        raise ProtocolError(
            f"the shares that client {sender} sent to client {recipient} were changed on their way, so they are "
            "refused: repeat the round, and find out who sits between the clients"
        ) from error


def _cipher(shared: bytes, session: bytes, sender: int, recipient: int) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(derive(shared, "letter", session, sender, recipient))
