"""A split from a file: that of an earlier run, or one that somebody else has published."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError
from fedssl.files import write_bytes, write_text
from fedssl.partition.base import Indices, Parts, Splittable, owner_of, parts_of
from fedssl.partition.measures import fingerprint

SPLIT_FILE = "split.npz"  # of the split in a run directory


def write_split(path: Path, parts: Sequence[Indices]) -> None:
    """Write a split whole or not at all: a `.json` list of index lists, else a `.npz` with `owner` (n,), the clients.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path.suffix == ".json":
        write_text(path, json.dumps([part.tolist() for part in parts]))
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, owner=owner_of(parts))
    write_bytes(path, buffer.getvalue())


def read_split(path: str, n: int, clients: int) -> Parts:
    """Reads a split of `n` examples among `clients`; the parts come back sorted.

    Args:
        path: a run directory, a `.npz` with `owner` (n,) or one array of positions a client, in their order (client_0,
            client_1, ..), or a `.json` list of lists of positions.
        n: examples of the training set.
        clients: of the federation.

    Raises:
        ConfigError: no such file, another form, or no partition of these examples among so many clients.
    """
    file = Path(path).expanduser()
    file = file / SPLIT_FILE if file.is_dir() else file
    try:
        lists = _json(file) if file.suffix == ".json" else _npz(file)
        parts = [_positions(rows, client, file) for client, rows in enumerate(lists)]
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {file}; pass partition.path=/path/to/a/run, .npz or .json.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"{file} is not a split ({error}); give a .json list of index lists, or a .npz with owner or one array of "
            "positions a client."
        ) from error
    if len(parts) != clients:
        raise ConfigError(
            f"{file} has {len(parts)} clients but the job has {clients}; set federation.clients to match."
        )
    _check(parts, n, file)
    return [np.sort(rows) for rows in parts]


@dataclass(frozen=True)
class Stored:
    """A split read from a file, see `read_split`; every machine of the federation needs that file.

    Args:
        path: a run directory, a .npz or a .json.
        fingerprint: refuse any other split, as the manifest of a run tells it; null takes what is there.
    """

    path: str
    fingerprint: str | None = None
    uses_labels: ClassVar[bool] = False

    def split(self, data: Splittable, clients: int, rng: np.random.Generator) -> Parts:
        """See `read_split`."""
        parts = read_split(self.path, len(data), clients)
        found = fingerprint(parts)
        if self.fingerprint not in (None, found):
            raise ConfigError(
                f"The split of {self.path} has the fingerprint {found[:16]}.., not {str(self.fingerprint)[:16]}..; "
                "copy the right file there."
            )
        return parts


def _json(file: Path) -> list[Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not all(isinstance(rows, list) for rows in content):
        raise ValueError("it holds no list of lists")
    return content


def _npz(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it is a .npy file")
        arrays = {name: archive[name] for name in archive}
    if "owner" not in arrays:
        return [arrays[name] for name in _numbered(arrays)]
    owner = arrays["owner"]
    if owner.ndim != 1 or not np.issubdtype(owner.dtype, np.integer) or owner.size == 0 or owner.min() < 0:
        raise ValueError("owner must be (n,) whole numbers from 0 on")
    return list(parts_of(owner.astype(np.int64), int(owner.max()) + 1))


def _numbered(names: Iterable[str]) -> list[str]:
    """The names in the order of the numbers that they end with."""
    numbers = {name: name.rpartition("_")[2] for name in names}
    if not all(number.isascii() and number.isdigit() for number in numbers.values()):
        raise ValueError(f"it holds {', '.join(sorted(numbers))}")
    return sorted(numbers, key=lambda name: int(numbers[name]))


def _positions(rows: Any, client: int, file: Path) -> NDArray[np.int64]:
    found = np.asarray(rows)
    if found.size == 0:
        raise ConfigError(f"Client {client} of {file} has no example and cannot train; leave that client out.")
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ConfigError(f"Client {client} of {file} has {found.dtype} {found.shape}; give a list of whole numbers.")
    return found.astype(np.int64)


def _check(parts: Sequence[Indices], n: int, file: Path) -> None:
    """Refuse what is no partition of 0 .. n - 1."""
    rows = np.concatenate(parts)
    outside = (rows < 0) | (rows >= n)
    if outside.any():
        raise ConfigError(
            f"{file} names example {rows[outside][0]} but the training set has {n}, numbered from 0; "
            "choose the data that it was made for."
        )
    times = np.bincount(rows, minlength=n)
    if times.max() > 1:
        which = int(times.argmax())
        clients = [client for client, part in enumerate(parts) if which in part]
        raise ConfigError(
            f"{file} gives example {which} out {times[which]} times (client {', '.join(map(str, clients))}); "
            "name every example once."
        )
    if times.min() == 0:
        raise ConfigError(
            f"{file} leaves out {np.count_nonzero(times == 0)} of {n} examples, the first is {times.argmin()}; give "
            "every example to a client, or choose the data that it was made for."
        )
