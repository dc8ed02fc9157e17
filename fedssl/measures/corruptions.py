"""Corruptions of test examples: what a linear probe still reads from noisy, blurred, pale or shifted inputs.

Four kinds and five severities in the manner of Hendrycks & Dietterich 2019 (https://arxiv.org/abs/1903.12261), scaled
to the size of the example so that they serve 8x8 digits and 128 steps of a sensor alike.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl import seeds
from fedssl.errors import ConfigError

KINDS = ("noise", "blur", "contrast", "shift")
SEVERITIES = (1, 2, 3, 4, 5)
_NOISE = (0.08, 0.16, 0.26, 0.38, 0.5)  # standard deviation as a share of the data's own
_BLUR = (0.02, 0.04, 0.06, 0.08, 0.12)  # standard deviation as a share of the side
_CONTRAST = (0.6, 0.45, 0.3, 0.2, 0.1)  # what is left of the distance from the example's mean
_SHIFT = (0.03, 0.06, 0.09, 0.12, 0.18)  # as a share of the side, between pixels by linear interpolation


def corrupt(x: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Corrupts a batch of images (B, C, H, W) or signals (B, C, T), which is left as it is.

    Args:
        x: before normalisation, as a data set gives it.
        kind: noise (Gaussian), blur (Gaussian, along every axis), contrast (towards each channel's mean) or shift
            (along every axis; the edge is repeated; left or right, up or down at random for each example).
        severity: 1 to 5.
        seed: of noise and directions; equal seeds give equal corruptions.

    Raises:
        ConfigError: an unknown kind or severity, or examples that are neither images nor signals.
    """
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        raise ConfigError("corruptions are defined for images and time series; probe this run without them")
    if kind not in KINDS or severity not in SEVERITIES:
        raise ConfigError(f"corruption {kind} of severity {severity} is unknown: use {', '.join(KINDS)} and 1 to 5")
    at = severity - 1
    if kind == "noise":
        generator = seeds.torch_stream(seed, "corrupt", kind, severity)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return x + _NOISE[at] * x.std() * noise
    if kind == "contrast":
        mean = x.mean(tuple(range(2, x.dim())), keepdim=True)
        return mean + _CONTRAST[at] * (x - mean)
    for axis in range(2, x.dim()):
        x = _blurred(x, axis, _BLUR[at]) if kind == "blur" else _shifted(x, axis, _SHIFT[at], seed)
    return x


def _blurred(x: Tensor, axis: int, share: float) -> Tensor:
    sigma = max(0.3, share * x.shape[axis])
    radius = max(1, min(math.ceil(3 * sigma), x.shape[axis] - 1))
    taps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(taps**2) / (2 * sigma**2))
    lines = x.transpose(axis, -1)
    padded = F.pad(lines.flatten(0, -2).unsqueeze(1), (radius, radius), mode="replicate")
    return F.conv1d(padded, (kernel / kernel.sum()).view(1, 1, -1)).view(lines.shape).transpose(axis, -1)


def _shifted(x: Tensor, axis: int, share: float, seed: int) -> Tensor:
    length = x.shape[axis]
    generator = seeds.torch_stream(seed, "corrupt", "shift", axis)
    sign = torch.randint(0, 2, (len(x),), generator=generator).to(x.device) * 2 - 1
    places = torch.arange(length, device=x.device, dtype=x.dtype) + sign[:, None] * share * length  # (B, length)
    places = places.clamp(0, length - 1)
    low = places.floor()
    view = [len(x), *[1] * (x.dim() - 1)]
    view[axis] = length

    def read(at: Tensor) -> Tensor:
        return x.gather(axis, at.clamp(max=length - 1).long().view(view).expand(x.shape))

    return torch.lerp(read(low), read(low + 1), (places - low).view(view))
