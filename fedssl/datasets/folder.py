"""Any folder of images: one sub-folder per class, with or without train and test, or a flat one without labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedssl.datasets.base import Data, Dataset, Labels
from fedssl.datasets.pixels import Bytes, in_threads, square
from fedssl.datasets.split import stratified
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

SPLIT_SEED = 20240229  # of a folder without its own division: every run has the same test set
VIEWS = ImageViews()
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Folder:
    """Images below `root`: root/train/CLASS/x.png with root/test/CLASS/y.png, or root/CLASS/x.png, or root/x.png.

    Without root/train and root/test a share is held out, always the same. Images directly in a folder have no labels.

    Args:
        root: the folder.
        size: side in pixels; images are resized by their shorter side and cropped at the centre.
        test_fraction: share held out where the folder has no test part of its own.
        augment: how views are drawn; the number of its means decides whether images are read grey or in colour.

    Raises:
        ConfigError: size below 1.
    """

    root: str
    size: int = 32
    test_fraction: float = 0.2
    augment: ImageViews = VIEWS

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"data.size is {self.size} but an image needs pixels; use at least 1.")

    def load(self) -> Data:
        """Reads every image into memory, several at a time.

        Raises:
            ConfigError: no such folder, no image, one that cannot be read, or a test class unknown in training.
        """
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise ConfigError(f"There is no folder {self.root}; pass data.root=/path/to/a/folder/of/images.")
        if not (root / "train").is_dir() or not (root / "test").is_dir():
            files, labels, classes = listing(root)
            whole = self._read(files, labels)
            train, test = stratified(len(whole) if labels is None else labels, self.test_fraction, SPLIT_SEED)
            return Data(whole.subset(train), whole.subset(test), classes)
        files, labels, classes = listing(root / "train")
        held, held_labels, held_classes = listing(root / "test")
        if unknown := sorted(set(held_classes) - set(classes)):
            raise ConfigError(
                f"{root / 'test'} has classes that train lacks: {', '.join(unknown)}; use the same folders."
            )
        if held_labels is not None:
            held_labels = np.array([classes.index(name) for name in held_classes], np.int64)[held_labels]
        return Data(self._read(files, labels), self._read(held, held_labels), classes)

    def _read(self, files: list[Path], labels: Labels | None) -> Dataset:
        return Dataset(torch.from_numpy(np.stack(in_threads(self._one, files))), labels)

    def _one(self, file: Path) -> Bytes:
        try:
            with Image.open(file) as image:
                return square(image, self.size, self.augment.channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigError(f"The image {file} cannot be read ({error}); repair or remove it.") from error


def listing(folder: Path) -> tuple[list[Path], Labels | None, tuple[str, ...]]:
    """The images of a folder in sorted order, their labels, and the names of the classes, which are its sub-folders.

    Raises:
        ConfigError: no image, or images both in the folder and in sub-folders.
    """
    flat = _images(folder.glob("*"))
    nested = {sub.name: _images(sub.rglob("*")) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    nested = {name: files for name, files in nested.items() if files and not name.startswith(".")}
    if flat and nested:
        raise ConfigError(f"{folder} has images beside class folders; move them into a class, or out of it.")
    if not flat and not nested:
        raise ConfigError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); pass a folder of images.")
    if flat:
        return flat, None, ()
    labels = np.repeat(np.arange(len(nested)), [len(files) for files in nested.values()]).astype(np.int64)
    return [file for files in nested.values() for file in files], labels, tuple(nested)


def _images(paths: Iterable[Path]) -> list[Path]:
    found = [path for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
