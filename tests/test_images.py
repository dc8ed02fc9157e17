"""Image views: per-example, seeded, pure; and each operation by itself."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.modalities.images import LUMA, ImageViews, warp

OFF = ImageViews(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=0, jitter=0, grey=0, mean=(0.0,) * 3, std=(1.0,))
ALL = ImageViews(rotation=20, translate=0.1, blur=0.5, noise=0.05)
GREY = replace(ALL, mean=(0.5,), std=(0.25,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, channels: int = 3, size: int = 16) -> Tensor:
    return torch.rand(n, channels, size, size, generator=generator(99))


def one(views: ImageViews, x: Tensor, seed: int = 0) -> Tensor:
    return views.views(x, generator(seed), 1)[0]


@pytest.mark.parametrize(("views", "channels"), [(ALL, 3), (GREY, 1)])
@pytest.mark.parametrize("size", [8, 28, 33])
def test_views_are_seeded_differ_and_leave_the_images_alone(views: ImageViews, channels: int, size: int) -> None:
    x = pictures(channels=channels, size=size)
    before = x.clone()
    first, second = views.views(x, generator(), 2)
    again = views.views(x, generator(), 2)
    assert first.shape == second.shape == x.shape
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize(("views", "channels"), [(ALL, 3), (GREY, 1)])
def test_a_view_depends_on_its_own_image_only(views: ImageViews, channels: int) -> None:
    x = pictures(channels=channels, size=32)
    changed = x.clone()
    changed[3] = 1 - changed[3]
    here, there = one(views, x), one(views, changed)
    others = [i for i in range(len(x)) if i != 3]
    assert torch.equal(here[others], there[others])
    assert not torch.equal(here[3], there[3])


def test_views_never_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    one(ALL, pictures())
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_off_only_normalises() -> None:
    x = pictures()
    assert torch.equal(one(OFF, x), x)
    shifted = replace(OFF, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    expected = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    assert torch.equal(one(shifted, x), expected)
    assert torch.equal(shifted.plain(x), expected)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("size", [(8, 8), (16, 9)])
def test_the_identity_and_the_mirror_are_exact_warps(padding: str, size: tuple[int, int]) -> None:
    x = torch.rand(4, 3, *size, generator=generator())
    eye = torch.eye(2, 3).expand(4, 2, 3)
    mirror = eye * torch.tensor([[-1.0], [1.0]])
    torch.testing.assert_close(warp(x, eye, padding), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(x, mirror, padding), x.flip(3), atol=1e-5, rtol=0)


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    x = pictures(400, size=8)
    out = one(replace(OFF, flip=0.5), x)
    mirrored = (out - x.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    same = (out - x).abs().amax((1, 2, 3)) < 1e-5
    assert bool((mirrored ^ same).all())
    assert 150 < int(mirrored.sum()) < 250


def test_a_crop_shows_a_part_of_the_image_at_its_scale() -> None:
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64).contiguous()
    out = one(replace(OFF, crop=(0.25, 0.25)), ramp)
    slope = (out[:, 0, 32, 48] - out[:, 0, 32, 16]) / (ramp[:, 0, 32, 48] - ramp[:, 0, 32, 16])
    torch.testing.assert_close(slope, torch.full((200,), 0.5), atol=1e-3, rtol=0)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert float(out.mean((1, 2, 3)).std()) > 0.1  # the place varies


def test_a_rotation_keeps_the_centre_and_turns_as_far_as_it_says() -> None:
    x = torch.zeros(300, 3, 33, 33)
    x[:, :, 16, 16] = 1
    x[:, :, 16, 28] = 1  # 12 pixels to the right
    out = one(replace(OFF, rotation=30, padding="zeros"), x)[:, 0]
    assert bool((out[:, 16, 16] > 0.99).all())
    out[:, 12:21, 12:21] = 0
    grid = torch.arange(33.0) - 16
    down, along = (out * grid.view(1, 33, 1)).sum((1, 2)), (out * grid).sum((1, 2))
    angle = torch.atan2(down, along).abs() * 180 / math.pi
    assert float(angle.max()) < 31
    assert 10 < float(angle.mean()) < 20


def test_colour_operations_keep_grey_grey_and_stay_in_range() -> None:
    grey = torch.rand(50, 1, 8, 8, generator=generator()).expand(-1, 3, -1, -1)
    out = one(replace(OFF, jitter=1, saturation=0.8, hue=0.5, brightness=0, contrast=0), grey)
    torch.testing.assert_close(out, grey.contiguous(), atol=1e-5, rtol=0)
    strong = one(replace(OFF, jitter=1, brightness=2, contrast=2, saturation=2, hue=0.5), pictures(200))
    assert float(strong.min()) >= 0
    assert float(strong.max()) <= 1


def test_dropping_colour_leaves_the_luma() -> None:
    x = pictures()
    out = one(replace(OFF, grey=1), x)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    for channel in range(3):
        torch.testing.assert_close(out[:, channel], luma)


def test_brightness_and_contrast_are_linear_in_the_image() -> None:
    x = 0.4 + 0.2 * pictures(1)
    for views in (replace(OFF, jitter=1, contrast=0, saturation=0, hue=0), replace(OFF, jitter=1, brightness=0, hue=0)):
        out = one(replace(views, saturation=0), x)
        slope = (out[0, 0, 0, 0] - out[0, 0, 0, 1]) / (x[0, 0, 0, 0] - x[0, 0, 0, 1])
        fitted = out[0, 0, 0, 0] + slope * (x - x[0, 0, 0, 0])
        torch.testing.assert_close(out, fitted, atol=1e-4, rtol=0)
        assert 0.6 <= float(slope) <= 1.4


def test_a_blur_keeps_the_sum_and_spares_images_not_drawn() -> None:
    x = torch.zeros(200, 3, 16, 16)
    x[:, :, 8, 8] = 1
    out = one(replace(OFF, blur=0.5, blur_sigma=(1.0, 1.0)), x)
    torch.testing.assert_close(out.sum((2, 3)), torch.ones(200, 3))
    spared = (out == x).all(3).all(2).all(1)
    assert 60 < int(spared.sum()) < 140
    side = out[~spared][0, 0, 8, 7] / out[~spared][0, 0, 8, 8]
    assert float(side) == pytest.approx(math.exp(-0.5), rel=1e-5)


def test_noise_has_its_standard_deviation() -> None:
    out = one(replace(OFF, noise=0.1), torch.full((20, 3, 16, 16), 0.5))
    assert float(out.std()) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    "bad",
    [
        {"flip": 1.5},
        {"jitter": -0.1},
        {"blur": float("nan")},
        {"crop": (0.0, 1.0)},
        {"crop": (0.8, 0.2)},
        {"crop": (0.5, 1.5)},
        {"crop": (0.5,)},
        {"aspect": (0.0, 1.0)},
        {"hue": 0.6},
        {"rotation": 200},
        {"translate": -1},
        {"noise": -0.1},
        {"blur_sigma": (0.0, 1.0)},
        {"std": (0.0,)},
        {"mean": ()},
        {"mean": (0.5, 0.5)},
        {"std": (0.5, 0.5)},
        {"padding": "mirror"},
    ],
)
def test_values_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"augment.{next(iter(bad))}|augment.std"):
        ImageViews(**bad)


def test_images_with_other_channels_are_refused() -> None:
    assert (ImageViews().channels, GREY.channels) == (3, 1)
    with pytest.raises(ConfigError, match="1 channels"):
        ImageViews(jitter=0, grey=0).views(pictures(channels=1), generator(), 1)
    with pytest.raises(ConfigError, match="3 channels"):
        GREY.plain(pictures())


# --- The same distribution as a slow reference, image by image --------------------------------------------------------


def drawn_slowly(picture: np.ndarray, views: ImageViews, rng: random.Random) -> tuple[np.ndarray, dict[str, float]]:
    """One view of a (C, S, S) picture by torchvision's description: box, resize, flip, then PIL's colour operations.

    Nothing is batched, affine or a matrix: each pixel's place and colour is computed by itself.
    """
    side = picture.shape[1]
    area, log_ratio = rng.uniform(*views.crop), rng.uniform(math.log(views.aspect[0]), math.log(views.aspect[1]))
    width, height = (min(1.0, math.sqrt(area * r)) * side for r in (math.exp(log_ratio), math.exp(-log_ratio)))
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    flip = rng.random() < views.flip
    out = np.empty_like(picture)
    for i in range(side):
        for j in range(side):
            across = side - 1 - j if flip else j
            y, x = (top + (i + 0.5) * height / side - 0.5, left + (across + 0.5) * width / side - 0.5)
            y, x = min(max(y, 0.0), side - 1.0), min(max(x, 0.0), side - 1.0)
            a, b = min(int(y), side - 2), min(int(x), side - 2)
            v, u = y - a, x - b
            rows = [(1 - u) * picture[:, k, b] + u * picture[:, k, b + 1] for k in (a, a + 1)]
            out[:, i, j] = (1 - v) * rows[0] + v * rows[1]
    if rng.random() < views.jitter:
        factors = [rng.uniform(max(0, 1 - s), 1 + s) for s in (views.brightness, views.contrast, views.saturation)]
        out = out * factors[0]
        out = factors[1] * out + (1 - factors[1]) * np.dot(LUMA, out.mean((1, 2)))
        out = factors[2] * out + (1 - factors[2]) * np.tensordot(LUMA, out, 1)
    if rng.random() < views.grey:
        out = np.broadcast_to(np.tensordot(LUMA, out, 1), out.shape)
    return out.clip(0, 1), {"width": width / side, "height": height / side, "left": left / side, "top": top / side}


def test_crops_have_the_area_place_and_aspect_of_the_slow_reference() -> None:
    """A picture whose channels are its coordinates shows where each view was taken from."""
    views, side, count = replace(OFF, crop=(0.2, 1.0), aspect=(0.75, 4 / 3), flip=0.5), 16, 4000
    along = ((torch.arange(side) + 0.5) / side).expand(side, side)
    place = torch.stack([along, along.T, torch.zeros(side, side)]).expand(count, -1, -1, -1).contiguous()
    out = one(views, place)[:, :2, 4:12, 4:12]  # the middle never needs pixels of the edge
    per = side / 7
    slope_x, slope_y = (out[:, 0, 4, 7] - out[:, 0, 4, 0]) * per, (out[:, 1, 7, 4] - out[:, 1, 0, 4]) * per
    middle = out.mean((2, 3))
    width, height = slope_x.abs(), slope_y.abs()
    ours = {"width": width, "height": height, "left": middle[:, 0] - width / 2, "top": middle[:, 1] - height / 2}
    rng, picture = random.Random(7), np.zeros((3, 2, 2))
    drawn = [drawn_slowly(picture, views, rng)[1] for _ in range(count)]
    slow = {name: torch.tensor([each[name] for each in drawn]) for name in drawn[0]}
    for of in (ours, slow):
        of["area"], of["log aspect"] = of["width"] * of["height"], (of["width"] / of["height"]).log()
    for name, mine in ours.items():
        assert distance(mine, slow[name]) < 0.043, name  # Kolmogorov-Smirnov: exceeded by chance once in a thousand
    assert 0.46 < float((slope_x < 0).float().mean()) < 0.54
    assert bool((slope_y > 0).all())


def test_colours_have_the_distribution_of_the_slow_reference() -> None:
    """Every colour of a picture, and how saturated it is; no hue, which is another formula here by design."""
    views = replace(OFF, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, grey=0.2)
    views, count, side = replace(views, hue=0), 4000, 2
    picture = 0.3 + 0.4 * torch.rand(3, side, side, generator=generator(5), dtype=torch.float64)
    out = one(views, picture.expand(count, -1, -1, -1).contiguous())
    rng = random.Random(11)
    slow = torch.from_numpy(np.stack([drawn_slowly(picture.numpy(), views, rng)[0] for _ in range(count)]))
    for pixel in ((0, 0), (1, 1)):
        for channel in range(3):
            assert distance(out[:, channel, *pixel], slow[:, channel, *pixel]) < 0.043
        vivid = [of[:, :, *pixel].amax(1) - of[:, :, *pixel].amin(1) for of in (out, slow)]
        assert distance(*vivid) < 0.043
    assert distance(out.mean((1, 2, 3)), slow.mean((1, 2, 3))) < 0.043
    assert distance(out.std((1, 2, 3)), slow.std((1, 2, 3))) < 0.043
    other = one(replace(views, contrast=0.8), picture.expand(count, -1, -1, -1).contiguous())
    assert distance(other.std((1, 2, 3)), slow.std((1, 2, 3))) > 0.06, "another strength is seen"


def test_whole_views_have_the_distribution_of_the_slow_reference() -> None:
    views, count, side = replace(ImageViews(hue=0), mean=(0.0,) * 3, std=(1.0,)), 1000, 6
    picture = 0.2 + 0.6 * torch.rand(3, side, side, generator=generator(3), dtype=torch.float64)
    out = one(views, picture.expand(count, -1, -1, -1).contiguous())
    rng = random.Random(13)
    slow = torch.from_numpy(np.stack([drawn_slowly(picture.numpy(), views, rng)[0] for _ in range(count)]))
    for pixel in ((0, 0), (2, 3), (5, 1)):
        for channel in range(3):
            assert distance(out[:, channel, *pixel], slow[:, channel, *pixel]) < 0.087
    change = [(of[:, :, 2, 2] - of[:, :, 2, 3]).abs().sum(1) for of in (out, slow)]
    assert distance(*change) < 0.087, "neighbouring pixels differ by as much"


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two distribution functions, of up to 1e-9 equal values."""
    a, b = a.double().mul(1e9).round().sort().values, b.double().mul(1e9).round().sort().values
    both = torch.cat([a, b]).unique()
    shares = [torch.searchsorted(of, both, right=True).double() / len(of) for of in (a, b)]
    return float((shares[0] - shares[1]).abs().max())
