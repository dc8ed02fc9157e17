"""What a client's camera or sensor does to its examples: rotation, blur, colour of the light, exposure and noise.

It acts on a batch on its device, before augmentation. What comes out depends on the example and the client alone, not
on the batch, the round, or the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl import seeds
from fedssl.datasets.base import Table
from fedssl.errors import ConfigError
from fedssl.modalities.images import LUMA
from fedssl.modalities.timeseries import rotations
from fedssl.partition import Appearance

_WORD = 0xFFFFFFFF  # integers below 2**32 in int64
_BITS = 23  # of a uniform number: the largest that keep both of its ends inside (0, 1) in float32


@dataclass(frozen=True, eq=False)
class Optics:
    """All clients' appearances as tensors, and how they act on a batch.

    Attributes:
        strengths: (clients,) of each kind that some client uses.
        turns: (clients, 3, 3) of the sensor; read for time series.
        key: (clients,) int64, of the noise.
        unit: (C,) what a noise of 1 means for each channel.
    """

    strengths: dict[str, Tensor]
    turns: Tensor
    key: Tensor
    unit: Tensor

    @classmethod
    def of(cls, appearances: Sequence[Appearance], shape: tuple[Any, ...], unit: Tensor, key: int) -> Optics:
        """Optics for examples of a shape, on the unit's device.

        Args:
            appearances: of each client.
            shape: (C, H, W) or (C, T).
            unit: (C,), see `unit_of`.
            key: names the noise, from `seeds.key`.

        Raises:
            ConfigError: the shape does not allow what an appearance does.
        """
        _check(appearances, shape)
        kinds = ("rotation", "blur", "temperature", "gain", "noise")
        values = {kind: torch.tensor([float(getattr(one, kind)) for one in appearances]) for kind in kinds}
        axes = torch.tensor([one.axis for one in appearances], dtype=torch.float32)
        turns = rotations(axes, values["rotation"].deg2rad())
        keys = torch.tensor([seeds.key(key, "client", client) & _WORD for client in range(len(appearances))])
        used = {kind: value for kind, value in values.items() if bool(value.any())}
        return cls(used, turns, keys, unit).to(unit.device)

    def to(self, device: str | torch.device) -> Optics:
        """The same on `device`."""
        strengths = {kind: value.to(device) for kind, value in self.strengths.items()}
        return replace(
            self, strengths=strengths, turns=self.turns.to(device), key=self.key.to(device), unit=self.unit.to(device)
        )

    def __call__(self, x: Tensor, client: Tensor, place: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] or (B, C, T) as its clients (B,) see it; `place` (B,) are the examples' positions."""
        images = x.dim() == 4
        own = {kind: value[client] for kind, value in self.strengths.items()}
        if "rotation" in own:
            x = _rotated(x, own["rotation"].deg2rad()) if images else _turned(x, self.turns[client])
        for axis in range(2, x.dim()) if "blur" in own else ():
            widest = float(self.strengths["blur"].max())  # of all clients: the kernel's length is nobody's own
            x = _blurred(x, axis, own["blur"], widest)
        if "temperature" in own or "gain" in own:
            x = x * _light(own, x.shape[1]).view(len(x), -1, *[1] * (x.dim() - 2))
        if "noise" in own:
            scale = own["noise"].unsqueeze(1) * self.unit
            x = x + scale.view(len(x), -1, *[1] * (x.dim() - 2)) * gaussian(self.key[client], place, x[0])
        return x.clamp(0, 1) if images and self.strengths else x


def gaussian(key: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """(B, *like.shape) standard normal numbers that depend on the key, the place and the position alone.

    A counter-based generator: each number is a hash of what it is for, so that any batch can be drawn at once and none
    in advance, and a GPU draws the same as a CPU up to rounding.

    Args:
        key, place: (B,) int64.
        like: one example.
    """
    position = _mixed(torch.arange(like.numel(), device=key.device) + 1)
    hashed = _mixed(_mixed(key ^ _mixed(place & _WORD)).unsqueeze(1) ^ position)
    uniform = ((hashed >> (32 - _BITS)).to(like.dtype) + 0.5) / 2**_BITS
    return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).view(-1, *like.shape)


def unit_of(table: Table) -> Tensor:
    """(C,) what a noise of 1 means: 1 for images, each channel's standard deviation over all series."""
    if len(table.shape) != 2:
        return torch.ones((), device=table.device)
    sums = torch.zeros(3, table.shape[0], dtype=torch.float64, device=table.device)
    for rows in torch.split(torch.arange(len(table), device=table.device), 4096):
        x = table.batch(rows).double()
        sums += torch.stack((torch.ones_like(x).sum((0, 2)), x.sum((0, 2)), x.square().sum((0, 2))))
    mean = sums[1] / sums[0]
    return (sums[2] / sums[0] - mean.square()).clamp(min=0).sqrt().float()


def _check(appearances: Sequence[Appearance], shape: tuple[Any, ...]) -> None:
    channels = shape[0]
    if len(shape) not in (2, 3):
        raise ConfigError(
            f"feature_shift changes images and time series, but the examples have the shape {shape}; use another "
            "partition."
        )
    if any(one.temperature for one in appearances) and (len(shape) != 3 or channels != 3):
        raise ConfigError(
            f"partition.temperature tints images in colour, but the examples have the shape {shape}; set it to 0."
        )
    if len(shape) == 2 and channels % 3 and any(one.rotation for one in appearances):
        raise ConfigError(
            f"partition.rotation turns channels in threes (x, y, z), but the series have {channels}; set it to 0."
        )


def _mixed(x: Tensor) -> Tensor:
    """A hash of integers in [0, 2**32), one to one on them: two rounds of xor-shift and multiply."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Counter-clockwise by (B,) radians about the centre; the edge is repeated."""
    height, width = x.shape[2:]
    down, along = ((torch.arange(n, device=x.device) * 2 + 1 - n) / n for n in (height, width))
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    down, along = down.unsqueeze(1), along.unsqueeze(0)
    grid = (cos * along - sin * down * (height / width), sin * along * (width / height) + cos * down)
    return F.grid_sample(x, torch.stack(grid, 3), mode="bilinear", padding_mode="border", align_corners=False)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Series whose channels, in threes, are turned by (B, 3, 3)."""
    triples = x.view(len(x), -1, 1, 3, x.shape[2])
    return (turns.view(-1, 1, 3, 3, 1) * triples).sum(3).view(x.shape)


def _blurred(x: Tensor, axis: int, sigma: Tensor, widest: float) -> Tensor:
    """Gaussian along one axis of standard deviations (B,), a share of its length; the edge is repeated."""
    length = x.shape[axis]
    radius = max(1, min(math.ceil(3 * widest * length), 2 * length))
    taps = torch.arange(-radius, radius + 1, device=x.device)
    width = (sigma.unsqueeze(1) * length).clamp(min=1e-3)  # so narrow that 0 leaves the example as it is
    kernel = torch.exp(-(taps**2) / (2 * width**2))
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B, taps)
    pad = (radius, radius) if axis == x.dim() - 1 else (0, 0, radius, radius)
    padded = F.pad(x, (*pad, *[0] * (2 * x.dim() - 4 - len(pad))), mode="replicate")
    out = torch.zeros_like(x)
    for tap, weight in enumerate(kernel.unbind(1)):
        out = torch.addcmul(out, weight.view(-1, *[1] * (x.dim() - 1)), padded.narrow(axis, tap, length))
    return out


def _light(own: dict[str, Tensor], channels: int) -> Tensor:
    """(B, C) factors of the channels, or (B, 1) for all."""
    factor = own["gain"].exp().unsqueeze(1) if "gain" in own else torch.ones((), device=next(iter(own.values())).device)
    if "temperature" not in own:
        return factor
    warm = own["temperature"].unsqueeze(1)
    tint = torch.cat((warm.exp(), torch.ones_like(warm), (-warm).exp()), 1)
    luma = torch.tensor(LUMA, device=warm.device)
    return factor * tint / (tint * luma).sum(1, keepdim=True)
