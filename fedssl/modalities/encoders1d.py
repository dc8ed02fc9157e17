"""A network that turns time series (B, C, T) into features (B, dim)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.networks.norms import norm2d


@dataclass(frozen=True)
class Conv1d:
    """A convolution of kernel 7 and two residual blocks, each of which halves the length, then the mean over time.

    Args:
        width: channels of the first layer; 2x follows, and `dim` last.
        dim: size of the features.
        norm: "batch", "group", "layer" or "none".

    Raises:
        ConfigError: width or dim below 1, or an unknown norm.

    References:
        Wang, Yan and Oates 2017, arXiv:1611.06455 (the residual network for time series, here smaller).
    """

    modality: ClassVar[str] = "timeseries"
    width: int = 32
    dim: int = 96
    norm: str = "group"

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("dim", self.dim)):
            if value < 1:
                raise ConfigError(f"encoder.{name} is {value} but a layer needs channels; use at least 1.")

    def make(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """The network for series of `shape` (C, T), of any length from 1 on, and its `dim`."""
        w = self.width
        layers: list[nn.Module] = [_conv(shape[0], w, 7, 2, self.norm), norm2d(self.norm, w), nn.ReLU()]
        blocks = (_Block(w, 2 * w, self.norm), _Block(2 * w, self.dim, self.norm))
        return nn.Sequential(*layers, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten()), self.dim


class _Block(nn.Module):
    """Convolutions of kernel 5 and 3 beside a 1x1 convolution; the length is halved, upwards."""

    def __init__(self, fan_in: int, fan_out: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(fan_in, fan_out, 5, 2, norm), norm2d(norm, fan_out)
        self.conv2, self.norm2 = _conv(fan_out, fan_out, 3, 1, norm), norm2d(norm, fan_out)
        self.shortcut, self.norm3 = _conv(fan_in, fan_out, 1, 2, norm), norm2d(norm, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.norm3(self.shortcut(x)))


def _conv(fan_in: int, fan_out: int, kernel: int, stride: int, norm: str) -> nn.Conv1d:
    """Its bias is left to the norm that follows."""
    return nn.Conv1d(fan_in, fan_out, kernel, stride, padding=kernel // 2, bias=norm == "none")
