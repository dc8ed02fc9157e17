"""Images in one .npz file: plain arrays or packed JPEG bytes, with or without a division into training and test."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.pixels import channels_first, decode, labelled, with_channels
from fedssl.datasets.split import Indices, balanced_head, stratified
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

SPLIT_SEED = 20240229  # of a file without its own division: every run has the same test set
TEST_FRACTION = 0.2
VIEWS = ImageViews()
GROUPS = ("groups", "domains", "subjects", "speakers", "writers")
CLASSES = ("class_names", "classes", "label_names")

Array = NDArray[Any]


@contextmanager
def open_npz(path: str) -> Iterator[Mapping[str, Array]]:
    """The arrays of a .npz file by name, read without pickle as they are asked for.

    Raises:
        ConfigError: no such file, or one that cannot be read, now or inside the `with`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"There is no file {path}; pass data.path=/path/to/a/file.npz.")
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a .npy file")
            yield archive
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"{path} cannot be read as a .npz file without pickle ({error}); write it with numpy.savez."
        ) from error


@dataclass(frozen=True)
class Npz:
    """A .npz file, read without pickle, whose arrays have one of these names (P is `train_` and `test_`, or nothing).

    Images: `Pimages` uint8 as (N, H, W), (N, H, W, C) or (N, C, H, W); or `x_train x_test x`; or `Pjpeg` with
    `Poffsets` (N + 1,), image i being the bytes offsets[i] to offsets[i + 1]. An array (N, K, H, W) of square images
    with K neither 1 nor 3 is K grey images of each row. Labels: `Plabels`, or `y_train y_test y`, or none.
    Groups for the natural partition: `Pgroups`, or domains, subjects, speakers, writers. Names: `class_names`.
    A file without test arrays is divided by its `is_test`, else a stratified fifth is held out, always the same.

    Args:
        path: the file.
        groups: name of the array of groups, without P; null looks for the usual names.
        limit: only so many training examples, from the start, of all classes and groups alike; null takes all.
        augment: how views are drawn; the number of its means decides whether images are made grey or colour.
    """

    path: str
    groups: str | None = None
    limit: int | None = None
    augment: ImageViews = VIEWS

    def load(self) -> Data:
        """Reads the file; JPEG images are decoded once, in threads.

        Raises:
            ConfigError: no such file, not such a file, or arrays that do not fit.
        """
        with open_npz(self.path) as archive:
            return self._read(archive)

    def _read(self, archive: Mapping[str, Array]) -> Data:
        names = next((tuple(str(name) for name in archive[key]) for key in CLASSES if key in archive), ())
        whole = self._table(archive, "")
        if whole is not None:
            train, test = whole.divided()
        else:
            first, second = self._table(archive, "train"), self._table(archive, "test")
            if first is None or second is None:
                raise ConfigError(
                    f"{self.path} holds {', '.join(sorted(archive))}; name the images train_images and test_images, "
                    "x_train and x_test, images, or their packed form train_jpeg and train_offsets."
                )
            train, test = first, second
        train = train.rows(balanced_head(train.kinds, len(train), self.limit))
        sets = [part.dataset(self.augment.channels) for part in (train, test)]
        top = max((int(part.targets.max()) for part in sets if part.targets is not None), default=-1)
        return Data(sets[0], sets[1], names or tuple(str(label) for label in range(top + 1)))

    def _table(self, archive: Mapping[str, Array], part: str) -> _Table | None:
        prefix = f"{part}_" if part else ""
        images = next((key for key in (f"{prefix}images", f"x_{part}".rstrip("_")) if key in archive), None)
        packed = f"{prefix}jpeg"
        if images is None and packed not in archive:
            return None

        def column(*keys: str) -> Array | None:
            return next((archive[key] for key in keys if key in archive), None)

        if self.groups is not None and prefix + self.groups not in archive:
            raise ConfigError(
                f"{self.path} has no array {prefix + self.groups}; it holds {', '.join(sorted(archive))}."
            )
        wanted = GROUPS if self.groups is None else (self.groups,)
        table = _Table(
            name=f"{images or packed} in {self.path}",
            pixels=None if images is None else archive[images],
            jpeg=None if images is not None else archive[packed],
            offsets=None if images is not None else column(f"{prefix}offsets"),
            labels=column(f"{prefix}labels", f"y_{part}".rstrip("_")),
            groups=column(*(prefix + key for key in wanted)),
            held=None if part else column("is_test"),
        )
        return table.checked()


@dataclass(frozen=True, eq=False)
class _Table:
    """The columns of one part of the file, before decoding."""

    name: str
    pixels: Array | None
    jpeg: Array | None
    offsets: Array | None  # (N + 1,) as stored; (N, 2) start and end after `checked`
    labels: Array | None
    groups: Array | None
    held: Array | None

    def __len__(self) -> int:
        stored = self.offsets if self.pixels is None else self.pixels
        return 0 if stored is None else len(stored)

    @property
    def kinds(self) -> Array | None:
        """(N,) a number for each label of each group; None where there are neither."""
        columns = [column.reshape(len(self), -1)[:, 0] for column in (self.labels, self.groups) if column is not None]
        codes = [np.unique(column, return_inverse=True)[1] for column in columns]
        return codes[0] * (1 + codes[-1].max()) + codes[-1] if codes else None

    def checked(self) -> _Table:
        """Columns of one length: spans for JPEG, one row per image where a row holds several grey ones."""
        table = self
        if self.pixels is None:
            jpeg, offsets = self.jpeg, self.offsets
            fits = jpeg is not None and offsets is not None and offsets.ndim == 1 and len(offsets) > 0
            if not fits or jpeg is None or offsets is None or np.any(np.diff(offsets) < 0) or offsets[-1] > len(jpeg):
                raise ConfigError(f"{self.name} has no array of offsets (N + 1,) that fits it; add one.")
            table = replace(self, offsets=np.stack((offsets[:-1], offsets[1:]), 1))
        for kind, column in (("labels", self.labels), ("groups", self.groups), ("is_test", self.held)):
            if column is not None and (column.ndim == 0 or len(column) != len(table)):
                raise ConfigError(
                    f"{kind} of {self.name} has shape {column.shape} for {len(table)} rows; give one per row."
                )
        shape = () if self.pixels is None else self.pixels.shape
        if self.pixels is None or len(shape) != 4 or shape[1] in (1, 3) or shape[3] in (1, 3) or shape[2] != shape[3]:
            return table
        spread = self.rows(np.repeat(np.arange(len(self)), shape[1]), pixels=False)
        return replace(spread, pixels=self.pixels.reshape(-1, *shape[2:]))

    def rows(self, index: Indices, *, pixels: bool = True) -> _Table:
        """These rows of every column."""

        def pick(column: Array | None) -> Array | None:
            return None if column is None else column[index]

        return replace(
            self,
            pixels=pick(self.pixels) if pixels else self.pixels,
            offsets=pick(self.offsets),
            labels=pick(self.labels),
            groups=pick(self.groups),
            held=pick(self.held),
        )

    def divided(self) -> tuple[_Table, _Table]:
        """Training and test rows."""
        if self.held is not None:
            held = self.held.astype(bool)
            return self.rows(np.flatnonzero(~held)), self.rows(np.flatnonzero(held))
        labels = len(self) if self.labels is None else self.labels.reshape(-1)
        train, test = stratified(labels, TEST_FRACTION, SPLIT_SEED)
        return self.rows(train), self.rows(test)

    def dataset(self, channels: int) -> Dataset:
        """Decodes the images."""
        if len(self) == 0:
            raise ConfigError(f"{self.name} holds no image; give at least one for training and one for testing.")
        return labelled(with_channels(self._images(channels), channels), self.labels, self.groups, self.name)

    def _images(self, channels: int) -> Tensor:
        if self.pixels is not None:
            return channels_first(self.pixels, self.name)
        if self.jpeg is None or self.offsets is None:
            return torch.empty(0)
        jpeg = self.jpeg
        return decode((jpeg[start:end] for start, end in self.offsets), channels, self.name)
