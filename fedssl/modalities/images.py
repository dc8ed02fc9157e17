"""Views of images: batched augmentation on the tensors' device, with parameters of its own for every example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.constants import Numbers, centres, constant
from fedssl.draws import Source, normal, uniform
from fedssl.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL's conversion to grey
TO_YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class ImageViews:
    """Random crop, rotation and flip in one affine warp, then colour, blur, noise and normalisation.

    The defaults are SimCLR's for CIFAR. Colour jitter is brightness, contrast, saturation, hue in this order, as one
    3x3 matrix and an offset, clipped once at the end; hue turns the chroma plane (YIQ), which is close to the HSV form.

    Args:
        crop: smallest and largest share of the area kept, 0 < a <= b <= 1; (1, 1) turns it off.
        aspect: smallest and largest width : height of the crop, drawn log-uniformly.
        rotation: largest angle in degrees, either way.
        translate: largest shift as a share of the side, either way.
        flip: probability of a left-right flip.
        jitter: probability of colour jitter.
        brightness, contrast, saturation: factors are drawn from 1 +- this, at least 0.
        hue: largest turn as a share of the circle, 0 to 0.5.
        grey: probability of dropping colour.
        blur: probability of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation in pixels.
        noise: standard deviation of added Gaussian noise, on the 0-1 scale.
        local_crop: share of the area that local views keep (multi-crop); read where a method asks for them.
        local_size: their side as a share of the image's.
        padding: what lies outside the image: "border" repeats the edge, "zeros" is black.
        mean: normalisation, one number per channel: their number says how many channels the images have.
        std: one number per channel, or one for all.

    Raises:
        ConfigError: a value outside its range.

    References:
        Chen et al. 2020, arXiv:2002.05709, appendix A and B.9.
    """

    modality: ClassVar[str] = "images"
    joint: ClassVar[bool] = True
    reads: ClassVar[str] = "float images in [0, 1], shape (batch, channels, height, width)"
    crop: tuple[float, ...] = (0.2, 1.0)
    aspect: tuple[float, ...] = (0.75, 1.3333)
    rotation: float = 0.0
    translate: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, ...] = (0.1, 2.0)
    noise: float = 0.0
    local_crop: tuple[float, ...] = (0.05, 0.4)
    local_size: float = 0.5
    padding: str = "border"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur"):
            _within(name, getattr(self, name), 0.0, 1.0, "it is a probability")
        for name in ("brightness", "contrast", "saturation", "noise"):
            _within(name, getattr(self, name), 0.0, math.inf, "it is a strength")
        _within("translate", self.translate, 0.0, 1.0, "it is a share of the side")
        _within("rotation", self.rotation, 0.0, 180.0, "it is an angle in degrees")
        _within("hue", self.hue, 0.0, 0.5, "it is a share of the colour circle")
        _interval("crop", self.crop, 1.0)
        _interval("local_crop", self.local_crop, 1.0)
        _within("local_size", self.local_size, 0.01, 1.0, "it is a share of the side")
        _interval("aspect", self.aspect, math.inf)
        _interval("blur_sigma", self.blur_sigma, math.inf)
        if self.padding not in ("border", "zeros"):
            raise ConfigError(f"augment.padding is {self.padding!r}, which is not known; use border or zeros.")
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, len(self.mean)) or min(self.std) <= 0:
            raise ConfigError(
                f"augment.mean {self.mean} and augment.std {self.std} cannot normalise; "
                "give 1 mean for grey or 3 for colour images, and as many standard deviations above 0."
            )

    @property
    def channels(self) -> int:
        """How many channels the images have: 1 grey, 3 colour."""
        return len(self.mean)

    def views(self, x: Tensor, generator: Source, count: int) -> list[Tensor]:
        """Draws `count` independent views of every image.

        View i depends on image i and the generator only, and `x` is left as it is.

        Args:
            x: (B, C, H, W) float in [0, 1], C 1 or 3.
            generator: the only source of randomness; numbers are drawn on its device.
            count: number of views.

        Returns:
            `count` normalised tensors (B, C, H, W).
        """
        return self._views(x, generator, count)

    def local_views(self, x: Tensor, generator: Source, count: int) -> list[Tensor]:
        """Draws `count` views of small crops at a lower resolution (multi-crop, Caron et al. 2020, arXiv:2006.09882).

        Returns:
            `count` normalised tensors (B, C, h, w), h and w the share `local_size` of H and W, at least 4.
        """
        sides = [max(4, round(side * self.local_size)) for side in x.shape[2:]]
        small = replace(self, crop=self.local_crop)
        return small._views(x, generator, count, sides)

    def plain(self, x: Tensor) -> Tensor:
        """Only normalises: (B, C, H, W) in [0, 1] to zero mean and unit variance, for evaluation.

        Raises:
            ConfigError: the images have another number of channels than `mean`.
        """
        if x.shape[1] != self.channels:
            raise ConfigError(
                f"The images have {x.shape[1]} channels "
                f"but data.augment.mean has {self.channels} numbers; give one per channel."
            )
        mean, std = (constant(tuple(values), x).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def _views(self, x: Tensor, generator: Source, count: int, sides: Sequence[int] | None = None) -> list[Tensor]:
        """All views in one pass, in half of the time for small batches; their numbers are drawn view by view."""
        shape = (*x.shape[:2], *(sides or x.shape[2:]))
        drawn = [self._drawn(shape, generator, x, sides is not None) for _ in range(count)]
        u = {name: torch.cat([own[name] for own in drawn], 1) for name in drawn[0]}
        x = x.repeat(count, 1, 1, 1)
        if "place" in u:
            x = warp(x, self._affine(x, u["place"], u["angle"]), self.padding, sides)
        if "colour" in u:
            x = self._recolour(x, u["colour"])
        if "blur" in u:
            x = self._blurred(x, u["blur"])
        if "noise" in u:
            x = x + self.noise * u["noise"][0]
        return list(torch.split(self.plain(x), shape[0]))

    def _drawn(self, shape: Sequence[int], source: Source, like: Tensor, resized: bool) -> dict[str, Tensor]:
        """The random numbers of one view (B, C, H, W), those that it needs; each example has a column of each."""
        count, found = shape[0], {}
        if self._warps() or resized:
            found["place"] = uniform((7, count), 1, source, like)
            found["angle"] = uniform((1, count), 1, source, like)
        if self._colours():
            found["colour"] = uniform((6, count), 1, source, like)
        if self.blur > 0:
            found["blur"] = uniform((2, count), 1, source, like)
        if self.noise > 0:
            found["noise"] = normal((1, *shape), 1, source, like)
        return found

    def _warps(self) -> bool:
        crops = self.crop[0] < 1 or tuple(self.aspect) != (1.0, 1.0)
        return crops or self.rotation > 0 or self.translate > 0 or self.flip > 0

    def _colours(self) -> bool:
        jitters = self.brightness > 0 or self.contrast > 0
        if self.channels == 1:
            return self.jitter > 0 and jitters
        return self.grey > 0 or (self.jitter > 0 and (jitters or self.saturation > 0 or self.hue > 0))

    def _affine(self, x: Tensor, u: Tensor, turn: Tensor) -> Tensor:
        """(B, 2, 3) from output to input coordinates in [-1, 1]: flip, scale to the crop, rotate, move to its place."""
        count, aspect = x.shape[0], x.shape[3] / x.shape[2]
        area = _between(u[0], *self.crop)
        ratio = torch.exp(_between(u[1], math.log(self.aspect[0]), math.log(self.aspect[1])) / 2)
        width, height = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
        along = (2 * u[2] - 1) * (1 - width) + self.translate * 2 * (2 * u[4] - 1)
        down = (2 * u[3] - 1) * (1 - height) + self.translate * 2 * (2 * u[5] - 1)
        angle = (2 * turn[0] - 1) * math.radians(self.rotation)
        cos, sin = angle.cos(), angle.sin()
        mirrored = torch.where(u[6] < self.flip, -width, width)
        rows = (cos * mirrored, -sin * height / aspect, along, sin * mirrored * aspect, cos * height, down)
        return torch.stack(rows, 1).view(count, 2, 3)

    def _recolour(self, x: Tensor, u: Tensor) -> Tensor:
        """x' = A x + offset, clipped to [0, 1]; A is (B, C, C)."""
        count, channels = x.shape[:2]
        on = u[0] < self.jitter
        one = torch.ones_like(u[0])
        bright = torch.where(on, _factor(u[1], self.brightness), one)
        contrast = torch.where(on, _factor(u[2], self.contrast), one)
        luma = constant(LUMA if channels == 3 else (1.0,), x)
        grey_mean = x.mean((2, 3)) @ luma
        offset = bright * (1 - contrast) * grey_mean
        gain = (bright * contrast).view(count, 1, 1)
        if channels == 1:
            return (gain.unsqueeze(3) * x + offset.view(count, 1, 1, 1)).clamp(0, 1)
        to_grey = luma.expand(3, 3)
        keep = torch.where(on, _factor(u[3], self.saturation), one).view(count, 1, 1)
        colour = gain * (to_grey + keep * (constant(IDENTITY, x) - to_grey))
        if self.hue > 0:
            turn = torch.where(on, (2 * u[4] - 1) * self.hue * 2 * math.pi, torch.zeros_like(one))
            colour = _hue_matrix(turn) @ colour
        if self.grey > 0:
            colour = torch.where((u[5] < self.grey).view(count, 1, 1), to_grey @ colour, colour)
        flat = torch.baddbmm(offset.view(count, 1, 1), colour, x.flatten(2))
        return flat.clamp_(0, 1).view(x.shape)

    def _blurred(self, x: Tensor, u: Tensor) -> Tensor:
        """Separable Gaussian whose kernel spans a tenth of the side, as in SimCLR; the others pass unchanged."""
        sigma = _between(u[1], *self.blur_sigma)
        radius = max(1, min(x.shape[2:]) // 20)
        taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-(taps**2) / (2 * sigma.unsqueeze(1) ** 2))
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = torch.where((u[0] < self.blur).unsqueeze(1), kernel, (taps == 0).to(x.dtype))
        for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
            padded, length = F.pad(x, pad, mode="replicate"), x.shape[axis]
            weights = kernel.T.reshape(2 * radius + 1, -1, 1, 1, 1)
            x = weights[0] * padded.narrow(axis, 0, length)
            for shift in range(1, 2 * radius + 1):
                x = torch.addcmul(x, weights[shift], padded.narrow(axis, shift, length))
        return x


def warp(x: Tensor, theta: Tensor, padding: str = "border", sides: Sequence[int] | None = None) -> Tensor:
    """Samples (B, C, H, W) bilinearly at the (B, 2, 3) affine maps of the output grid; the identity returns x.

    The output has the sides of x, or those given.
    """
    height, width = sides or x.shape[2:]
    along = theta[:, None, :, 0] * centres(width, x)[:, None]  # (B, W, 2)
    down = theta[:, None, :, 1] * centres(height, x)[:, None] + theta[:, None, :, 2]  # (B, H, 2)
    grid = along[:, None] + down[:, :, None]  # as F.affine_grid, without its products of (H W, 3) by (3, 2) matrices
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def quarter_turns(x: Tensor, turns: Tensor) -> Tensor:
    """Square images (B, C, S, S), each turned by `turns` (B,) int64 times 90 degrees, in 0 to 3."""
    turned = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(x), device=x.device)]


def _hue_matrix(turn: Tensor) -> Tensor:
    """(B, 3, 3) in RGB that turns the chroma plane by (B,) radians and keeps luma and every grey."""
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    rows = (zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos)
    turned = torch.stack(rows, 1).view(-1, 3, 3)
    return constant(_from_yiq(), turn).matmul(turned).matmul(constant(TO_YIQ, turn))


@cache
def _from_yiq() -> Numbers:
    return tuple(map(tuple, torch.linalg.inv(torch.tensor(TO_YIQ, dtype=torch.float64)).tolist()))


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _factor(u: Tensor, strength: float) -> Tensor:
    return _between(u, max(0.0, 1 - strength), 1 + strength)


def _within(name: str, value: float, low: float, high: float, why: str) -> None:
    if not low <= value <= high:
        raise ConfigError(f"augment.{name} is {value} but {why}; choose it between {low:g} and {high:g}.")


def _interval(name: str, values: tuple[float, ...], top: float) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= top:
        raise ConfigError(f"augment.{name} is {values} but needs two numbers 0 < smallest <= largest <= {top:g}.")
