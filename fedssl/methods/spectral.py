"""Spectral contrast: a quadratic contrastive loss whose optimum factorises the graph of augmentations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from fedssl.errors import ConfigError
from fedssl.heads import embed, mlp
from fedssl.losses import spectral
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class SpectralContrast(SSLMethod):
    """Spectral contrastive learning (HaoChen et al. 2021, https://arxiv.org/abs/2106.04156).

    Projections are scaled to length sqrt(radius), as in the authors' code; the loss is quadratic in them.

    Attributes:
        radius: squared length of a projection, > 0.
        hidden, out, layers, norm: of the projector.
    """

    radius: float = 10.0
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ConfigError(f"method.radius={self.radius} is a squared length: give a number above 0")

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean over the batch of the pair form."""
        h, z = embed(model, batch.views)
        first, second = (F.normalize(x.float(), dim=1) * math.sqrt(self.radius) for x in z)
        return LossOutput(spectral(first, second).mean(), None, h[0], {})
