"""Masked autoencoding: restore the hidden patches of an example from the rest; one example's loss reads no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import masked_reconstruction
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import mlp
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class MaskedAutoencoder(SSLMethod):
    """A masked autoencoder for any encoder of images or time series, after He et al. 2022 (arXiv:2111.06377).

    Hidden patches are set to 0, the mean of normalised data, before the encoder, as in SimMIM (Xie et al. 2022,
    arXiv:2111.09886), since a convolution cannot leave them out; the decoder restores them from the pooled features
    alone, so that all that is learnt is in the features that will be used. The mean squared error is over hidden
    patches. Nothing couples examples (with `norm` other than batch), which suits differential privacy best.

    Attributes:
        patch: side of a patch in pixels, or its length in steps; it must divide the example's.
        mask: share of the patches that is hidden, in (0, 1).
        hidden, layers, norm: of the decoder.
    """

    modalities: ClassVar[tuple[str, ...]] = ("images", "timeseries")
    patch: int = 4
    mask: float = 0.6
    hidden: int = 256
    layers: int = 2
    norm: str = "layer"
    views: ClassVar[int] = 1
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("decoder"))

    def __post_init__(self) -> None:
        if self.patch < 1 or not 0 < self.mask < 1:
            raise ConfigError(f"method.patch={self.patch} must be at least 1 and method.mask={self.mask} in (0, 1)")

    @property
    def coupling(self) -> Coupling:
        """`batch` through batch normalisation, else `none`."""
        return Coupling.batch if self.norm == "batch" else Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and decoder."""
        channels, *sides = sizes.shape
        if any(side % self.patch for side in sides):
            raise ConfigError(
                f"method.patch={self.patch} does not divide examples of shape {sizes.shape} evenly: "
                "choose a patch that does"
            )
        outputs = channels
        for side in sides:
            outputs *= side
        decoder = mlp(sizes.dim, self.hidden, outputs, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean squared error over the hidden patches of each example."""
        x = batch.views[0]  # (B, C, H, W) or (B, C, T)
        target = patches(x, self.patch)  # (B, P, values)
        hidden = mask(batch.index, step, target.shape[1], self.mask)  # (B, P) bool
        seen = x * ~whole(hidden, x.shape[2:], self.patch)
        h = model["encoder"](seen)  # (B, dim)
        restored = patches(model["decoder"](h).view(x.shape), self.patch)
        each = masked_reconstruction(restored, target, hidden)  # (B,)
        return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h, {})


def patches(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) or (B, C, T) cut into (B, P, C * side * side) or (B, P, C * side), row by row."""
    sides = [n for axis in x.shape[2:] for n in (axis // side, side)]
    x = x.reshape(*x.shape[:2], *sides)  # (B, C, blocks, side, ...)
    count = (x.dim() - 2) // 2
    order = [0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2)]
    return x.permute(order).flatten(1, count).flatten(2)


def whole(hidden: Tensor, sides: torch.Size, patch: int) -> Tensor:
    """(B, P) patches to (B, 1, H, W) or (B, 1, T) pixels."""
    out = hidden.view(len(hidden), 1, *(side // patch for side in sides))
    for axis in range(2, out.dim()):
        out = out.repeat_interleave(patch, axis)
    return out


def mask(index: Tensor, step: Step, count: int, share: float) -> Tensor:
    """(B, count) bool, `share` of each row true: which patches are hidden from whom in this step.

    The loss has no generator, because it must be pure: a hash of example, patch and step orders the patches instead.
    """
    at = step.round * 1_000_003 + step.step
    patch = torch.arange(count, device=index.device)
    order = _hash(_hash(index.unsqueeze(1) + at * 7919) + patch).argsort(1).argsort(1)  # (B, count) ranks
    return order < max(1, min(count - 1, round(share * count)))


def _hash(x: Tensor) -> Tensor:
    """Mixes the bits of int64 values (the finaliser of MurmurHash3 with 31-bit factors, so that nothing overflows)."""
    x = x & 0x7FFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
    return x ^ (x >> 16)
