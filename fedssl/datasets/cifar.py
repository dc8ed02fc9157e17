"""CIFAR-10 and CIFAR-100 as their authors publish them: the python archive, or the folder extracted from it."""

from __future__ import annotations

# The published files are pickles, so this one file reads pickle; `_Plain` below builds arrays, texts and lists and
# nothing else, so a file can start no code.
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.pixels import labelled
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

VIEWS = ImageViews(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
URL = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Cifar:
    """32x32 colour images, 50,000 for training and 10,000 for testing.

    Args:
        root: the archive cifar-10-python.tar.gz or cifar-100-python.tar.gz, the folder extracted from it, or the folder
            that contains either.
        variant: 10 or 100 classes.
        augment: how views are drawn.

    Raises:
        ConfigError: another variant.

    References:
        Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """

    root: str
    variant: int = 10
    augment: ImageViews = VIEWS

    def __post_init__(self) -> None:
        if self.variant not in (10, 100):
            raise ConfigError(f"There is no CIFAR-{self.variant}; use data.variant=10 or data.variant=100.")

    def load(self) -> Data:
        """Reads the files of this variant.

        Raises:
            ConfigError: files that are missing, damaged, or hold more than arrays, texts and lists.
        """
        ten = self.variant == 10
        train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
        test, meta = ("test_batch", "batches.meta") if ten else ("test", "meta")
        label = "labels" if ten else "fine_labels"
        files = self._files([*train, test, meta])
        names = unpickle(files[meta], meta).get("label_names" if ten else "fine_label_names")
        if not isinstance(names, list) or len(names) != self.variant:
            raise ConfigError(f"{meta} in {self.root} does not name {self.variant} classes; fetch it from {URL}.")
        return Data(
            _dataset([(files[name], name) for name in train], label),
            _dataset([(files[test], test)], label),
            tuple(str(name) for name in names),
        )

    def _files(self, names: list[str]) -> dict[str, bytes]:
        root = Path(self.root).expanduser()
        stem = f"cifar-{self.variant}"
        folder = "cifar-10-batches-py" if self.variant == 10 else "cifar-100-python"
        places = [root, root / folder, root / f"{stem}-python.tar.gz"]
        found: dict[str, bytes] = {}
        for place in places:
            if place.is_file():
                found = _members(place, names)
                break
            if (place / names[0]).is_file():
                found = {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
                break
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(
                f"{self.root} does not hold {', '.join(missing)} of CIFAR-{self.variant}; fetch {stem}-python.tar.gz "
                f"from {URL} and pass data.root=/path/to/it."
            )
        return found


def unpickle(data: bytes, where: str) -> Mapping[str, Any]:
    """Reads a pickled dictionary of arrays, texts, numbers and lists.

    Raises:
        ConfigError: the file is damaged, not a dictionary, or names anything else, which could be code.
    """
    try:
        found = _Plain(io.BytesIO(data), where).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where} is damaged ({error}); fetch the archive again from {URL}.") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{where} holds a {type(found).__name__}, not a dictionary; fetch the archive again from {URL}."
        )
    return found


class _Plain(pickle.Unpickler):
    """An unpickler for which only the parts of a numpy array have a meaning."""

    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file, encoding="latin1")
        self._where = where

    def find_class(self, module: str, name: str, /) -> Callable[..., Any]:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): _latin1,
        }
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) not in allowed:
            raise ConfigError(
                f"{self._where} names {module}.{name}, which is not part of an array and could be code; "
                f"do not use this file, fetch the archive again from {URL}."
            )
        return allowed[module, name]


def _empty_array(kind: type, shape: tuple[int, ...], code: Any) -> np.ndarray:
    """What numpy's own function gives; its state follows in the pickle."""
    if kind is not np.ndarray or shape != (0,):
        raise ValueError("not the beginning of an array")
    return np.ndarray((0,), dtype=np.int8)


def _dtype(code: str, align: object = False, copy: object = False) -> np.dtype[Any]:
    """The type of numbers that a code such as u1 means; old files pass 0 and 1 for no and yes."""
    kind = np.dtype(code)
    if kind.hasobject:
        raise ValueError("an array of objects")
    return kind


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"an encoding {encoding!r}")
    return text.encode("latin1")


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """The named members, read into memory; nothing is written."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in names and (stream := tar.extractfile(member)) is not None:
                    found[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{archive} cannot be read as an archive ({error}); fetch it again from {URL}.") from error
    return found


def _dataset(files: list[tuple[bytes, str]], label: str) -> Dataset:
    pixels, labels = [], []
    for data, where in files:
        table = unpickle(data, where)
        rows, own = table.get("data"), table.get(label)
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
            raise ConfigError(
                f"{where} has no uint8 array data of shape (N, 3072); fetch the archive again from {URL}."
            )
        if not isinstance(own, list) or len(own) != len(rows):
            raise ConfigError(
                f"{where} has no list {label} with one label per image; fetch the archive again from {URL}."
            )
        pixels.append(rows.reshape(-1, 3, 32, 32))
        labels.append(np.array(own))
    return labelled(torch.from_numpy(np.concatenate(pixels)), np.concatenate(labels), None, files[0][1])
