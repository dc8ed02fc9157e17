"""Views of time series: batched augmentation on the tensors' device, with parameters of its own for every example."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.constants import constant
from fedssl.draws import Source, normal, uniform
from fedssl.errors import ConfigError

NORMALISE = ("constants", "each")
_KNOTS = 5  # places along a series where the speed of a time warp is drawn
_BANDS = 16  # of the spectrum in `Statistics`
_TINY = 1e-6  # added to the deviation of a series, so that a flat one becomes 0


@dataclass(frozen=True)
class TimeSeriesViews:
    """Turns the sensor, normalises, then changes order, time axis, spectrum, size and noise of each series.

    The operations come in the order of the arguments below. All but the rotation act on normalised series, so that
    their strengths mean the same whatever the units; each is off at 0, or at (1, 1) for crops.

    Args:
        rotation: largest angle in degrees by which the sensor is turned about a random axis; channels are taken in
            threes (x, y, z), and all triples of an example turn alike, as one device worn differently.
        normalise: "constants" takes `mean` and `std`; "each" takes those of each channel of each series, which fits
            any units and forgets the level.
        mean: of the data, one number per channel, or one for all.
        std: one number per channel, or one for all.
        flip: probability of a changed sign, drawn for each channel.
        permutation: probability of cutting the series into pieces of random lengths and shuffling them.
        segments: the most pieces, at least 2; their number is drawn from 2 on.
        crop: smallest and largest share of the series that is kept, 0 < a <= b <= 1; the window is stretched linearly
            to the full length.
        warp: standard deviation of the logarithm of the speed, which varies smoothly along the series.
        frequency_mask: largest share of the spectrum that is removed, in one band drawn for each example; its mean
            stays.
        scaling: standard deviation of the factor, about 1, that multiplies each channel.
        jitter: standard deviation of added Gaussian noise, in units of the normalised series.
        time_mask: largest share of the steps set to 0, in one span drawn for each example.
        local_crop: share that local views keep (multi-crop); read where a method asks for them.
        local_size: their length as a share of the full one.

    Raises:
        ConfigError: a value outside its range.

    References:
        Um et al. 2017, arXiv:1706.00527 (jitter, scaling, rotation, permutation, warping, cropping);
        Eldele et al. 2021, arXiv:2106.14112 (TS-TCC: permutation and jitter for contrastive learning);
        Zhang et al. 2022, arXiv:2206.08496 (TF-C: views that remove frequencies).
    """

    modality: ClassVar[str] = "timeseries"
    joint: ClassVar[bool] = True
    reads: ClassVar[str] = "float signals in the units of the data, shape (batch, channels, steps)"
    rotation: float = 0.0
    normalise: str = "each"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flip: float = 0.0
    permutation: float = 0.0
    segments: int = 5
    crop: tuple[float, ...] = (0.5, 1.0)
    warp: float = 0.0
    frequency_mask: float = 0.0
    scaling: float = 0.2
    jitter: float = 0.1
    time_mask: float = 0.0
    local_crop: tuple[float, ...] = (0.1, 0.4)
    local_size: float = 0.5

    def __post_init__(self) -> None:
        for name in ("flip", "permutation"):
            _within(name, getattr(self, name), 1.0, "it is a probability")
        for name in ("frequency_mask", "time_mask", "local_size"):
            _within(name, getattr(self, name), 1.0, "it is a share")
        for name in ("warp", "scaling", "jitter"):
            _within(name, getattr(self, name), math.inf, "it is a strength")
        _within("rotation", self.rotation, 180.0, "it is an angle in degrees")
        for name in ("crop", "local_crop"):
            share = getattr(self, name)
            if len(share) != 2 or not 0 < share[0] <= share[1] <= 1:
                raise ConfigError(f"augment.{name} is {share} but needs two numbers 0 < smallest <= largest <= 1.")
        if self.segments < 2:
            raise ConfigError(f"augment.segments is {self.segments} but one piece cannot be shuffled; use at least 2.")
        if self.normalise not in NORMALISE:
            raise ConfigError(
                f"augment.normalise is {self.normalise!r}, which is not known; use {' or '.join(NORMALISE)}."
            )
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not self.mean or len(self.std) not in (1, len(self.mean)) or min(self.std) <= 0 or not finite:
            raise ConfigError(
                f"augment.mean {self.mean} and augment.std {self.std} cannot normalise; give one mean per channel, "
                "or one for all, and as many standard deviations above 0."
            )

    def views(self, x: Tensor, generator: Source, count: int) -> list[Tensor]:
        """Draws `count` independent views of every series.

        View i depends on series i and the generator only, and `x` is left as it is.

        Args:
            x: (B, C, T) float, in the units of the data.
            generator: the only source of randomness; numbers are drawn on its device.
            count: number of views.

        Returns:
            `count` normalised tensors (B, C, T).
        """
        return [self._view(x, generator, x.shape[2]) for _ in range(count)]

    def local_views(self, x: Tensor, generator: Source, count: int) -> list[Tensor]:
        """Draws `count` views of short windows at a lower resolution (multi-crop, Caron et al. 2020, arXiv:2006.09882).

        Returns:
            `count` normalised tensors (B, C, t), t the share `local_size` of T, at least 4.
        """
        short = replace(self, crop=self.local_crop)
        return [short._view(x, generator, max(4, round(x.shape[2] * self.local_size))) for _ in range(count)]

    def plain(self, x: Tensor) -> Tensor:
        """Only normalises (B, C, T), for evaluation.

        Raises:
            ConfigError: the series have another number of channels than `mean`.
        """
        if self.normalise == "each":
            variance, mean = torch.var_mean(x, 2, correction=0, keepdim=True)
            return (x - mean) / (variance.sqrt() + _TINY)
        if len(self.mean) not in (1, x.shape[1]):
            raise ConfigError(
                f"The series have {x.shape[1]} channels but data.augment.mean has {len(self.mean)} numbers; "
                "give one per channel, or one for all."
            )
        mean, std = (constant(tuple(values), x).view(1, -1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def _view(self, x: Tensor, generator: Source, length: int) -> Tensor:
        """(B, C, length)."""
        if self.rotation > 0:
            x = self._turned(x, generator)
        x = self.plain(x)
        if self.flip > 0:
            x = torch.where(uniform((*x.shape[:2], 1), 0, generator, x) < self.flip, -x, x)
        if self.permutation > 0:
            x = self._shuffled(x, generator)
        if self.crop[0] < 1 or self.warp > 0 or length != x.shape[2]:
            x = resample(x, self._times(x, generator, length))
        if self.frequency_mask > 0:
            x = self._without_band(x, generator)
        if self.scaling > 0:
            x = x * (1 + self.scaling * normal((*x.shape[:2], 1), 0, generator, x))
        if self.jitter > 0:
            x = x + self.jitter * normal(x.shape, 0, generator, x)
        if self.time_mask > 0:
            x = x.masked_fill(_span(x.shape[2], self.time_mask, generator, x).unsqueeze(1), 0.0)
        return x

    def _turned(self, x: Tensor, generator: Source) -> Tensor:
        count, channels, steps = x.shape
        if channels % 3:
            raise ConfigError(
                f"augment.rotation turns channels in threes (x, y, z), but the series have {channels}; "
                "set it to 0 for this data."
            )
        angle = (2 * uniform((count,), 0, generator, x) - 1) * math.radians(self.rotation)
        turn = rotations(normal((count, 3), 0, generator, x), angle)  # (B, 3, 3)
        triples = x.reshape(count, channels // 3, 3, steps)
        return (turn.unsqueeze(1) @ triples).view(x.shape)

    def _shuffled(self, x: Tensor, generator: Source) -> Tensor:
        count, _, steps = x.shape
        u = uniform((2 * self.segments + 1, count, 1), 1, generator, x)
        pieces = 2 + (u[0] * (self.segments - 1)).floor()  # (B, 1) 2 .. segments
        cuts = 1 + (u[1 : self.segments] * (steps - 1)).floor()  # (segments - 1, B, 1) in 1 .. T - 1; equal ones may be
        used = torch.arange(1, self.segments, device=x.device).view(-1, 1, 1) < pieces
        time = torch.arange(steps, device=x.device)
        piece = (used & (time >= cuts)).sum(0)  # (B, T) the piece of each step
        place = u[self.segments : -1, :, 0].T.gather(1, piece)  # pieces are put in the order of these numbers
        order = torch.where(u[-1] < self.permutation, place.argsort(dim=1, stable=True), time)
        return x.gather(2, order.unsqueeze(1).expand(x.shape))

    def _times(self, x: Tensor, generator: Source, length: int) -> Tensor:
        """(B, length) increasing times within [0, T - 1] at which a view looks."""
        last, steps = x.shape[2] - 1, max(1, length - 1)
        u = uniform((2, x.shape[0], 1), 1, generator, x)
        path = torch.arange(length, device=x.device, dtype=x.dtype) / steps  # 0 .. 1
        if self.warp > 0:
            knots = torch.linspace(0, 1, _KNOTS, device=x.device, dtype=x.dtype).unsqueeze(1)
            hats = (1 - (path - knots).abs() * (_KNOTS - 1)).clamp(min=0)  # (knots, length), a column adds up to 1
            speed = (self.warp * normal((x.shape[0], _KNOTS), 0, generator, x) @ hats).exp()  # (B, length)
            walked = ((speed[:, 1:] + speed[:, :-1]) / 2).cumsum(1)
            path = torch.cat((torch.zeros_like(u[0]), walked / walked[:, -1:]), 1) if length > 1 else path
        width = (self.crop[0] + (self.crop[1] - self.crop[0]) * u[0]) * last
        return (u[1] * (last - width) + width * path).clamp(0, last)

    def _without_band(self, x: Tensor, generator: Source) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=2)  # (B, C, T // 2 + 1); the first is the sum
        band = _span(spectrum.shape[2] - 1, self.frequency_mask, generator, x)
        band = torch.cat((torch.zeros_like(band[:, :1]), band), 1)
        kept: Tensor = torch.fft.irfft(spectrum.masked_fill(band.unsqueeze(1), 0.0), n=x.shape[2], dim=2)
        return kept


def resample(x: Tensor, at: Tensor) -> Tensor:
    """Reads (B, C, T) linearly at the times `at` (B, L) in [0, T - 1]; whole numbers give the values themselves."""
    low = at.floor()
    index = low.long().unsqueeze(1).expand(-1, x.shape[1], -1)  # (B, C, L)
    after = (index + 1).clamp(max=x.shape[2] - 1)
    return torch.lerp(x.gather(2, index), x.gather(2, after), (at - low).unsqueeze(1))


def rotations(axis: Tensor, angle: Tensor) -> Tensor:
    """(B, 3, 3) turns by `angle` (B,) radians about `axis` (B, 3), of any length above 0 (Rodrigues' formula)."""
    x, y, z = (axis / axis.norm(dim=1, keepdim=True).clamp(min=_TINY)).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), 1).view(-1, 3, 3)
    sin, cos = angle.sin().view(-1, 1, 1), angle.cos().view(-1, 1, 1)
    eye = torch.eye(3, dtype=axis.dtype, device=axis.device)
    return eye + sin * cross + (1 - cos) * (cross @ cross)


class Statistics(nn.Module):
    """Series (B, C, T) to what a person would measure first, (B, 22 C): an encoder must beat a classifier of these.

    Of each channel: mean, deviation, smallest, largest, mean size, mean size of the steps, and the logarithm of the
    spectrum in 16 bands from the lowest frequency to half the highest; a short series leaves some bands 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        steps = x.diff(dim=2).abs().mean(2) if x.shape[2] > 1 else torch.zeros_like(x[:, :, 0])
        spread = x.std(2, correction=0)
        moments = torch.stack((x.mean(2), spread, x.amin(2), x.amax(2), x.abs().mean(2), steps), 2)
        spectrum = torch.fft.rfft(x, dim=2).abs()[:, :, 1:]  # without the mean
        width = max(1, x.shape[2] // (4 * _BANDS))
        kept = F.pad(spectrum, (0, max(0, width * _BANDS - spectrum.shape[2])))[:, :, : width * _BANDS]
        bands = kept.reshape(*x.shape[:2], _BANDS, width).mean(3).log1p()
        return torch.cat((moments, bands), 2).flatten(1)


def _span(length: int, share: float, generator: Source, like: Tensor) -> Tensor:
    """(B, length) bool: one run of true in each row, its length uniform in 0 .. share * length, its place uniform."""
    u = uniform((2, like.shape[0], 1), 1, generator, like)
    width = (u[0] * (int(share * length) + 1)).floor()
    start = (u[1] * (length - width + 1)).floor()
    place = torch.arange(length, device=like.device)
    return (place >= start) & (place < start + width)


def _within(name: str, value: float, high: float, why: str) -> None:
    if not 0 <= value <= high:
        raise ConfigError(f"augment.{name} is {value} but {why}; choose it between 0 and {high:g}.")
