"""Image views: per-example, seeded, pure; and each operation by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews, warp

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
