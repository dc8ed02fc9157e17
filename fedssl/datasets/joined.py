"""Several data sets of images as one, each a group of its own: with partition=natural, a data set a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.datasets.base import Data, Dataset, Labels
from fedssl.datasets.pixels import with_channels
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

VIEWS = ImageViews()
_BLOCK = 2048  # images resized at a time


@dataclass(frozen=True)
class Joined:
    """Training and test sets of all sources, one after the other, with the source's name as the group.

    Images are resized by their shorter side, cropped at the centre, and made grey or colour. Classes of the same name
    are one class, numbered as they first appear; labels are kept only where every source has them.

    Args:
        sources: any data sets of images, by name; how they draw views themselves is not read.
        size: side in pixels.
        rename: of a source, its class names that mean a class of another name: {second: {automobile: car}}.
        augment: how views are drawn; the number of its means decides whether images are made grey or colour.

    Raises:
        ConfigError: no source, size below 1, or `rename` of a source that is not there.
    """

    sources: dict[str, Any]
    size: int = 32
    rename: dict[str, dict[str, str]] = field(default_factory=dict)
    augment: ImageViews = VIEWS

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty; add one with +data@data.sources.NAME=OPTION.")
        if self.size < 1:
            raise ConfigError(f"data.size is {self.size} but an image needs pixels; use at least 1.")
        if unknown := sorted(set(self.rename) - set(self.sources)):
            raise ConfigError(
                f"data.rename speaks of {unknown[0]}, but the sources are {', '.join(self.sources)}; name one of them."
            )

    def load(self) -> Data:
        """Loads every source.

        Raises:
            ConfigError: a source gives no images, or lacks a class that `rename` speaks of.
        """
        loaded = {name: source.load() for name, source in self.sources.items()}
        for name, data in loaded.items():
            if not isinstance(data.train, Dataset):
                raise ConfigError(
                    f"data.sources.{name} gives {type(data.train).__name__} but only images are joined; leave it out."
                )
            if absent := sorted(set(self.rename.get(name, ())) - set(data.classes)):
                raise ConfigError(
                    f"data.rename.{name} speaks of class {absent[0]}, but {name} has {', '.join(data.classes)}; "
                    "name one of them."
                )
        named = {
            name: [self.rename.get(name, {}).get(old, old) for old in data.classes] for name, data in loaded.items()
        }
        classes = tuple(dict.fromkeys(word for words in named.values() for word in words))
        numbers = {name: np.array([classes.index(word) for word in words], np.int64) for name, words in named.items()}
        train = self._joined({name: data.train for name, data in loaded.items()}, numbers)
        return Data(train, self._joined({name: data.test for name, data in loaded.items()}, numbers), classes)

    def _joined(self, parts: dict[str, Dataset], numbers: dict[str, Labels]) -> Dataset:
        images = torch.cat([fitted(part.images, self.size, self.augment.channels) for part in parts.values()])
        targets = [None if part.targets is None else numbers[name][part.targets] for name, part in parts.items()]
        groups = np.repeat(list(parts), [len(part) for part in parts.values()])
        return Dataset(images, _all(targets), groups)


def fitted(images: Tensor, size: int, channels: int) -> Tensor:
    """Images (N, C, H, W) uint8 as (N, channels, size, size): resized by the shorter side and cropped at the centre."""
    images = with_channels(images, channels)
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    sides = [max(size, round(side * size / min(height, width))) for side in (height, width)]
    top, left = ((side - size) // 2 for side in sides)
    blocks = (
        F.interpolate(block.float(), sides, mode="bilinear", antialias=True, align_corners=False)
        for block in torch.split(images, _BLOCK)
    )
    return torch.cat(
        [block[:, :, top : top + size, left : left + size].round().clamp(0, 255).to(torch.uint8) for block in blocks]
    )


def _all(targets: Sequence[Labels | None]) -> Labels | None:
    there = [column for column in targets if column is not None]
    return np.concatenate(there) if len(there) == len(targets) else None
