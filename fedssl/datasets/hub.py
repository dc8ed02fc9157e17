"""Image data sets of the Hugging Face hub, by name; needs the extra `hub`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.pixels import labelled, square
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

VIEWS = ImageViews()


@dataclass(frozen=True)
class Hub:
    """A data set of the hub (or a local copy of one) with a column of images and perhaps one of labels.

    Args:
        name: as on the hub, e.g. "uoft-cs/cifar10".
        image_column: the column of images.
        label_column: the column of labels; null for none.
        size: side in pixels; images are resized by their shorter side and cropped at the centre.
        train_split, test_split: names of the parts.
        augment: how views are drawn; the number of its means decides whether images are read grey or in colour.

    Raises:
        ConfigError: size below 1.
    """

    name: str
    image_column: str = "image"
    label_column: str | None = "label"
    size: int = 32
    train_split: str = "train"
    test_split: str = "test"
    augment: ImageViews = VIEWS

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"data.size is {self.size} but an image needs pixels; use at least 1.")

    def load(self) -> Data:
        """Reads both parts into memory, fetching what is not in the hub's cache.

        Raises:
            ConfigError: the extra is not installed, or the data set, a part or a column is not there.
        """
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                "The package `datasets` is not installed, which reads the hub; run pip install 'fedssl[hub]'."
            ) from error
        parts = []
        for split in (self.train_split, self.test_split):
            try:
                parts.append(datasets.load_dataset(self.name, split=split))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"The part {split} of {self.name} cannot be had from the hub ({error}); check data.name, "
                    "data.train_split, data.test_split and the connection."
                ) from error
        train, test = (self._dataset(part) for part in parts)
        return Data(train, test, self._classes(parts[0], train, test))

    def _dataset(self, part: Any) -> Dataset:
        wanted = [self.image_column] + ([] if self.label_column is None else [self.label_column])
        for column in wanted:
            if column not in part.column_names:
                raise ConfigError(
                    f"{self.name} has no column {column}, only {', '.join(part.column_names)}; set data.image_column "
                    "and data.label_column (null for none)."
                )
        if len(part) == 0:
            raise ConfigError(f"{self.name} has a part without images; choose another data.train_split or test_split.")
        pixels, labels = [], []
        for row in part:
            pixels.append(square(row[self.image_column], self.size, self.augment.channels))
            labels.append(0 if self.label_column is None else row[self.label_column])
        images = torch.from_numpy(np.stack(pixels))
        return labelled(images, None if self.label_column is None else np.array(labels), None, self.name)

    def _classes(self, part: Any, train: Dataset, test: Dataset) -> tuple[str, ...]:
        if train.targets is None or test.targets is None:
            return ()
        names = getattr(part.features[self.label_column], "names", None)
        top = max(int(train.targets.max()), int(test.targets.max()))
        return tuple(names) if names else tuple(str(label) for label in range(top + 1))
