"""Files of a device that only the holder of its key can read, or change unnoticed: AES-256-GCM."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedssl.errors import ConfigError, ResumeError

_MAGIC, _VERSION = b"fedssl-sealed", 1
_NONCE, _KEY = 12, 32  # bytes; random nonces of one key may serve 2^32 files (NIST SP 800-38D, 8.3)


def key_in(path: Path) -> bytes:
    """The key of a file: 32 random bytes, which its owner alone may read.

    Raises:
        ConfigError: there is no such file, others may read it, or it is no key.
    """
    how = f"make one with `umask 077; head -c {_KEY} /dev/urandom > {path}`"
    try:
        with path.open("rb") as file:
            mode, content = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(_KEY + 1)
    except OSError as error:
        raise ConfigError(f"the state-key {path} cannot be read ({error.strerror}): {how}") from error
    if mode & 0o077:
        raise ConfigError(f"the state-key {path} has mode {mode:04o}, so others may read it: chmod 600 {path}")
    if len(content) != _KEY:
        raise ConfigError(f"the state-key {path} is not {_KEY} bytes long: {how}")
    return content


def seal(content: bytes, key: bytes, name: str) -> bytes:
    """Encrypt a file's content; `name`, which is not secret, cannot be changed either."""
    head, nonce = _MAGIC + bytes([_VERSION]), os.urandom(_NONCE)
    return head + nonce + AESGCM(key).encrypt(nonce, content, head + name.encode())


def is_sealed(content: bytes) -> bool:
    """Whether a file's content, or its beginning, is that of an encrypted one."""
    return content.startswith(_MAGIC)


def unseal(content: bytes, key: bytes, path: Path) -> bytes:
    """What was encrypted in the file `path`, under the last part of its name.

    Raises:
        ResumeError: a later version wrote it, with another key or under another name, or it has been changed since.
    """
    head, rest = content[: len(_MAGIC) + 1], content[len(_MAGIC) + 1 :]
    if head[-1:] != bytes([_VERSION]):
        raise ResumeError(f"{path} was written by a later version of fedssl: install that one")
    try:
        return AESGCM(key).decrypt(rest[:_NONCE], rest[_NONCE:], head + path.name.encode())
    except (InvalidTag, ValueError) as error:  # ValueError: cut short
        raise ResumeError(
            f"{path} cannot be opened with this node's state-key: it was written with another, or has been changed; "
            "give back the key, or delete the file and what the client has kept with it"
        ) from error
