"""From files and foreign layouts to (N, C, H, W) bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fedssl.datasets.base import Dataset
from fedssl.errors import ConfigError
from fedssl.modalities.images import LUMA

Bytes = NDArray[np.uint8]
T = TypeVar("T")


def channels_first(array: NDArray[Any], where: str) -> Tensor:
    """Any usual layout as (N, C, H, W): takes (N, H, W), (N, H, W, C) and (N, C, H, W) with C 1 or 3.

    Raises:
        ConfigError: another type than uint8, or another shape; `where` names the array.
    """
    shape = array.shape
    if array.dtype != np.uint8:
        raise ConfigError(f"{where} is {array.dtype}; images must be stored as uint8 from 0 to 255, so convert them.")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or shape[1] not in (1, 3):
        raise ConfigError(
            f"{where} has shape {shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3."
        )
    return torch.from_numpy(np.ascontiguousarray(array))


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Images (N, C, H, W) with this number of channels: grey is repeated (without a copy), colour becomes its luma."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    weights = [round(weight * 65536) for weight in LUMA]
    grey = sum(weight * images[:, c].to(torch.int32) for c, weight in enumerate(weights))
    return torch.as_tensor((grey + 32768) // 65536).to(torch.uint8).unsqueeze(1)


def decode(blobs: Iterable[Bytes], channels: int, where: str) -> Tensor:
    """Encoded images (JPEG, PNG, ...), all of one size, as (N, C, H, W); several at a time.

    Raises:
        ConfigError: one of them cannot be read, or their sizes differ; `where` names the array.
    """

    def one(numbered: tuple[int, Bytes]) -> Bytes:
        number, blob = numbered
        try:
            with Image.open(io.BytesIO(blob.tobytes())) as image:
                return _array(image, channels)
        except OSError as error:
            raise ConfigError(
                f"Image {number} of {where} cannot be decoded ({error}); write the file again."
            ) from error

    decoded = in_threads(one, enumerate(blobs))
    if len({image.shape for image in decoded}) > 1:
        raise ConfigError(f"{where} holds images of different sizes; resize them to one size.")
    return torch.from_numpy(np.stack(decoded))


def square(image: Image.Image, size: int, channels: int) -> Bytes:
    """(C, size, size): turned upright, resized by its shorter side and cropped at the centre."""
    upright = ImageOps.exif_transpose(image)
    mode = "RGB" if channels == 3 else "L"
    return _array(ImageOps.fit(upright.convert(mode), (size, size), Image.Resampling.BICUBIC), channels)


def in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """The results in order; Pillow releases the lock while it decodes."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def labelled(images: Tensor, labels: NDArray[Any] | None, groups: NDArray[Any] | None, where: str) -> Dataset:
    """A data set whose labels, (N,) or (N, 1) whole numbers of any type, become int64.

    Raises:
        ConfigError: labels that are not one whole number per image.
    """
    if labels is None:
        return Dataset(images, None, groups)
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(labels):
        raise ConfigError(
            f"The labels of {where} are {labels.dtype} of shape {labels.shape}; give one whole number per image."
        )
    return Dataset(images, labels.reshape(-1).astype(np.int64), groups)


def _array(image: Image.Image, channels: int) -> Bytes:
    """(C, H, W)."""
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]
