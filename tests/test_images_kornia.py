"""Views have the distribution of kornia's, operation by operation, where both mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_images import OFF, one
from test_images import distance as exact_distance
from torch import Tensor

augmentation: Any = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
COUNT = 4000
LIMIT = 0.043  # Kolmogorov-Smirnov: exceeded by chance once in a thousand


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """kornia draws from the global generator, which is given back as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def distance(a: Tensor, b: Tensor) -> float:
    """Between distributions of numbers that are equal to five digits."""
    return exact_distance(a.double().round(decimals=5), b.double().round(decimals=5))


def taken(views: Tensor, side: int) -> dict[str, Tensor]:
    """Of views of a picture whose channels are its coordinates: where each was taken from, as shares of the side."""
    low, high = side * 3 // 8, side * 5 // 8  # away from the edge, which is repeated
    across, down = views[:, 0, side // 2], views[:, 1, :, side // 2]
    width, height = ((of[:, high] - of[:, low]) * side / (high - low) for of in (across, down))
    left = across[:, side // 2 - 1 : side // 2 + 1].mean(1) - width / 2
    return {"left": left, "width": width, "height": height, "area": width * height}


def test_crops() -> None:
    """At areas that no aspect pushes out of the picture; there kornia draws anew and we clamp."""
    side, area, aspect = 64, (0.2, 0.6), (0.75, 4 / 3)
    along = ((torch.arange(side) + 0.5) / side).expand(side, side)
    place = torch.stack([along, along.T, torch.zeros(side, side)]).expand(COUNT, -1, -1, -1)
    ours = taken(one(replace(OFF, crop=area, aspect=aspect), place), side)
    crop = augmentation.RandomResizedCrop((side, side), area, aspect, align_corners=False, cropping_mode="resample")
    theirs = taken(crop(place), side)
    for name, mine in ours.items():  # theirs begin and end at whole pixels, which nearby numbers hide
        spread = (torch.rand(COUNT) - 0.5) / side
        assert distance(mine, theirs[name] + spread) < LIMIT, name


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours(name: str) -> None:
    """One strength at a time; all numbers stay inside [0, 1], where nothing is clipped."""
    picture = 0.3 + 0.3 * torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(5))
    many, strength = picture.expand(COUNT, -1, -1, -1).contiguous(), 0.05 if name == "hue" else 0.4
    off = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    ours = one(replace(OFF, jitter=0.8, grey=0.0, **{**off, name: strength}), many)
    theirs = augmentation.ColorJitter(**{**off, name: strength}, p=0.8)(many)
    if name == "hue":  # theirs turns in HSV, ours the chroma plane: as far, not to the same colours
        mine, other = ((of - many).abs().mean((1, 2, 3)) for of in (ours, theirs))
        assert float(mine.mean() / other.mean()) == pytest.approx(1, rel=0.35)
        return
    for pixel in ((0, 0), (1, 1)):
        for channel in range(3):
            assert distance(ours[:, channel, *pixel], theirs[:, channel, *pixel]) < LIMIT
    weaker = one(replace(OFF, jitter=0.8, grey=0.0, **{**off, name: strength / 2}), many)
    assert max(distance(weaker[:, c, 0, 0], theirs[:, c, 0, 0]) for c in range(3)) > 2 * LIMIT, "half of it is seen"


def test_grey_and_blur() -> None:
    picture = 0.2 + 0.6 * torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(5))
    many = picture.expand(COUNT, -1, -1, -1).contiguous()
    ours, theirs = one(replace(OFF, grey=0.2), many), augmentation.RandomGrayscale(p=0.2)(many)
    assert distance(ours[:, 0, 3, 3], theirs[:, 0, 3, 3]) < LIMIT
    blur = augmentation.RandomGaussianBlur((3, 3), (0.1, 2.0), border_type="replicate", p=0.5)
    ours, theirs = one(replace(OFF, blur=0.5, blur_sigma=(0.1, 2.0)), many), blur(many)
    for pixel in ((0, 0), (9, 9), (19, 5)):
        assert distance(ours[:, 1, *pixel], theirs[:, 1, *pixel]) < LIMIT
