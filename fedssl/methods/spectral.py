"""Spectral contrast: a quadratic contrastive loss whose optimum factorises the graph of augmentations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import moments, spectral
from fedssl.losses.decomposed import BATCH_NORM, Own
from fedssl.losses.similarity import wide
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
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
        h, first, second = self._projections(model, batch)
        return LossOutput(spectral(first, second).mean(), None, h, {})

    def _projections(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, dim) of view 0, and both projections (B, out) at their length."""
        h, z = embed(model, batch.views)
        first, second = (F.normalize(wide(x), dim=1) * math.sqrt(self.radius) for x in z)
        return h[0], first, second

    @property
    def length(self) -> int:
        """Two second moments."""
        return 2 * self.out * self.out

    @property
    def matrix(self) -> int:
        """The second moments are out x out."""
        return self.out

    @property
    def undecomposed(self) -> str:
        """Batch normalisation."""
        return BATCH_NORM if self.norm == "batch" else ""

    def own(self, model: Model, batch: Batch, step: Step, n: int) -> Own:
        """The pairs of a record with itself, and the second moments, of length sqrt(2) * radius."""
        h, first, second = self._projections(model, batch)
        return Own(moments.spectral_own(first, second, n), moments.spectral_moments(first, second), h)

    def coupled(self, s: Tensor, n: int) -> Tensor:
        """The pairs of different records."""
        return moments.spectral_of(s, n)

    def settled(self, s: Tensor) -> Tensor:
        """With second moments that are positive semi-definite."""
        return moments.spectral_settled(s)

    def told(self, s: Tensor) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}
