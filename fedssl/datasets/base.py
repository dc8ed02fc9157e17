"""What every data source gives: images as bytes in one tensor, with labels and groups where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

Labels = NDArray[np.int64]
Groups = NDArray[Any]  # (N,) integers or names of authors, subjects, domains


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images (N, C, H, W) as uint8, with targets (N,) int64 and groups (N,), or None where there are none.

    Labels are read by probes and partitioners only.

    Raises:
        ConfigError: no images, or arrays whose kinds or lengths do not fit.
    """

    images: Tensor
    targets: Labels | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ConfigError(
                f"Images of shape {tuple(self.images.shape)} and type {self.images.dtype} were found; "
                "give uint8 of shape (N, C, H, W)."
            )
        if self.images.numel() == 0:
            raise ConfigError("This data set holds no image, so nothing can be trained; give at least one.")
        for name, column in (("targets", self.targets), ("groups", self.groups)):
            if column is not None and column.shape != (len(self),):
                raise ConfigError(
                    f"{name} has shape {column.shape} but there are {len(self)} images; give one per image."
                )
        if self.targets is not None and (self.targets.dtype != np.int64 or self.targets.min() < 0):
            raise ConfigError("targets must be int64 numbers from 0 on; pass None for images without labels.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """H, in pixels."""
        return self.images.shape[2]

    def batch(self, index: Tensor) -> Tensor:
        """The images (B, C, H, W) at (B,) int64 positions, as float32 in [0, 1] on the images' device."""
        picked = self.images.index_select(0, index.to(self.images.device))
        return picked.to(torch.float32).div_(255)

    def to(self, device: str | torch.device) -> Dataset:
        """The same data with its images on `device`."""
        return Dataset(self.images.to(device), self.targets, self.groups)

    def subset(self, index: Tensor | NDArray[np.int64]) -> Dataset:
        """The examples at these positions, in this order, copied."""
        rows = torch.as_tensor(index, dtype=torch.int64).cpu()
        images = self.images.index_select(0, rows.to(self.images.device))
        pick = rows.numpy()
        targets = None if self.targets is None else self.targets[pick]
        return Dataset(images, targets, None if self.groups is None else self.groups[pick])


@dataclass(frozen=True, eq=False)
class Data:
    """A training set, a test set of the same kind of image, and the names of the classes (empty without labels).

    Raises:
        ConfigError: the two sets differ in channels or size, or a label has no name.
    """

    train: Dataset
    test: Dataset
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ConfigError(
                f"Training images are {tuple(self.train.images.shape[1:])} but test images are "
                f"{tuple(self.test.images.shape[1:])} (C, H, W); an encoder needs one shape, so resize one of them."
            )
        for name, part in (("training", self.train), ("test", self.test)):
            if part.targets is not None and part.targets.max() >= len(self.classes):
                raise ConfigError(
                    f"A {name} label is {part.targets.max()} but there are {len(self.classes)} class names; "
                    "number the labels from 0 and name every class."
                )


class DataSource(Protocol):
    """A configured data set: a frozen dataclass whose fields say where it is and how its views are drawn."""

    @property
    def augment(self) -> ImageViews: ...
    def load(self) -> Data: ...
