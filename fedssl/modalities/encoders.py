"""Networks that turn images (B, C, H, W) into features (B, dim): a small one, and ResNet-18 with the CIFAR stem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.networks.norms import norm2d


class Mean(nn.Module):
    """The mean over positions, (B, C, H, W) -> (B, C).

    The values of `AdaptiveAvgPool2d(1)`, which lays channels-last results out in a way that many models at once cannot.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@dataclass(frozen=True)
class Conv4:
    """Four 3x3 convolutions with norm and ReLU, then the mean over positions. Two of them halve the image.

    Args:
        width: channels of the first layer; 2x, 4x follow, and `dim` last.
        dim: size of the features.
        norm: "batch", "group", "layer" or "none".

    Raises:
        ConfigError: width or dim below 1, or an unknown norm.
    """

    modality: ClassVar[str] = "images"
    width: int = 16
    dim: int = 64
    norm: str = "group"

    def __post_init__(self) -> None:
        _positive(width=self.width, dim=self.dim)

    def make(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """The network for images of `shape` (C, H, W), at least 4x4 pixels, and its `dim`."""
        w = self.width
        layers: list[nn.Module] = []
        sizes = [shape[0], w, 2 * w, 4 * w, self.dim]
        for fan_in, fan_out, stride in zip(sizes, sizes[1:], (1, 2, 2, 1), strict=False):
            layers += [_conv3(fan_in, fan_out, stride, self.norm), norm2d(self.norm, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, Mean()), self.dim


@dataclass(frozen=True)
class ResNet18:
    """ResNet-18, by default with the stem for small images: a 3x3 convolution of stride 1 and no max-pooling.

    Args:
        width: channels of the first stage; the features have 8 * width numbers.
        norm: "batch", "group", "layer" or "none".
        stem: "small", or "large": the paper's 7x7 convolution of stride 2 and max-pooling, as torchvision has it.

    Raises:
        ConfigError: width below 1, or an unknown norm or stem.

    References:
        He et al. 2016, arXiv:1512.03385; the small stem as in Chen et al. 2020, arXiv:2002.05709, appendix B.9.
    """

    modality: ClassVar[str] = "images"
    width: int = 64
    norm: str = "group"
    stem: str = "small"

    def __post_init__(self) -> None:
        _positive(width=self.width)
        if self.stem not in ("small", "large"):
            raise ConfigError(f"encoder.stem is {self.stem!r}, which is not known; use small or large.")

    def make(self, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
        """The network for images of `shape` (C, H, W), at least 8x8 pixels (large: 32x32), and its feature size."""
        w, large = self.width, self.stem == "large"
        first = _conv7(shape[0], w, self.norm) if large else _conv3(shape[0], w, 1, self.norm)
        layers: list[nn.Module] = [first, norm2d(self.norm, w), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, padding=1)] if large else []
        fan_in = w
        for stage in range(4):
            fan_out, stride = w << stage, 1 if stage == 0 else 2
            layers += [Residual(fan_in, fan_out, stride, self.norm), Residual(fan_out, fan_out, 1, self.norm)]
            fan_in = fan_out
        return nn.Sequential(*layers, Mean()), fan_in


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3(fan_in, fan_out, stride, norm), norm2d(norm, fan_out)
        self.conv2, self.norm2 = _conv3(fan_out, fan_out, 1, norm), norm2d(norm, fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if fan_in != fan_out or stride != 1:
            conv = nn.Conv2d(fan_in, fan_out, 1, stride, bias=norm == "none")
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.shortcut = nn.Sequential(conv, norm2d(norm, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def _conv3(fan_in: int, fan_out: int, stride: int, norm: str) -> nn.Conv2d:
    """A 3x3 convolution; its bias is left to the norm that follows."""
    conv = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _conv7(fan_in: int, fan_out: int, norm: str) -> nn.Conv2d:
    """A 7x7 convolution that halves the image."""
    conv = nn.Conv2d(fan_in, fan_out, 7, 2, padding=3, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"encoder.{name} is {value} but a layer needs channels; use at least 1.")
