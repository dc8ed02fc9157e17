"""Barlow Twins: make the cross-correlation of two views the identity; no negatives, no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl.heads import embed, mlp
from fedssl.losses import barlow_twins
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class BarlowTwins(SSLMethod):
    """Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230) with a three-layer projector.

    An example's loss depends on its batch through the correlations, so a batch of one example is refused.

    Attributes:
        off_diagonal: weight of the redundancy term.
        hidden, out, layers, norm: of the projector.
    """

    off_diagonal: float = 0.005
    hidden: int = 128
    out: int = 128
    layers: int = 3
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The squared distance of the correlation matrix from the identity, off-diagonal terms weighted."""
        h, (first, second) = embed(model, batch.views)
        return LossOutput(barlow_twins(first, second, off_diagonal=self.off_diagonal), None, h[0], {})
