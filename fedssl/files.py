"""Files that are whole or absent: written to a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedssl.errors import ConfigError, ResumeError
from fedssl.parts import Arrays


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, creating its folder.

    Raises:
        ConfigError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # where the folder is no folder, there is nothing to take away either
            temporary.unlink()
        raise ConfigError(f"{path} cannot be written ({error.strerror}): free space or pass another out=") from error


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON atomically. Values that are not finite are written as null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Replace numbers that JSON cannot hold (nan, inf) by None, in nested mappings and lists."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value


def fingerprint(place: Path) -> str:
    """What a file, or a folder with all below it, looks like: names, sizes and times of change, not contents.

    Hidden files do not count: that is where files are written before they are given their name.
    """
    content = hashlib.blake2b(digest_size=16)
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if any(part.startswith(".") for part in path.relative_to(place).parts):
            continue
        with suppress(OSError):  # it has gone since
            about = path.stat()
            if stat.S_ISREG(about.st_mode):
                content.update(f"{path.relative_to(place)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return content.hexdigest()


def number(value: object) -> float | None:
    """A value read from JSON if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, str] | None = None) -> None:
    """Write arrays as safetensors, atomically."""
    write_bytes(path, array_bytes(arrays, meta))


def array_bytes(arrays: Mapping[str, np.ndarray], meta: Mapping[str, str] | None = None) -> bytes:
    """Arrays as a safetensors file holds them."""
    from safetensors.numpy import save

    # safetensors stores memory as it lies: an array that is not contiguous would come back scrambled.
    own = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}
    content: bytes = save(own, dict(meta) if meta else None)
    return content


def arrays_of(content: bytes) -> tuple[Arrays, dict[str, str]]:
    """The arrays and metadata of `array_bytes`, whose source is trusted."""
    from safetensors.numpy import load

    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + length]).get("__metadata__", {})


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read arrays and metadata of a safetensors file.

    Raises:
        ResumeError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): it is damaged or missing; start the run anew") from error
