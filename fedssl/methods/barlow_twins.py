"""Barlow Twins: make the cross-correlation of two views the identity; no negatives, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedssl.losses import barlow_twins, moments
from fedssl.losses.decomposed import BATCH_NORM, Own
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
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

    @property
    def length(self) -> int:
        """Two means, two mean squares and the products."""
        return self.out * (4 + self.out)

    @property
    def matrix(self) -> int:
        """The correlations are out x out."""
        return self.out

    @property
    def undecomposed(self) -> str:
        """Batch normalisation."""
        return BATCH_NORM if self.norm == "batch" else ""

    def own(self, model: Model, batch: Batch, step: Step, n: int) -> Own:
        """No loss of its own, and the moments of both projections."""
        h, (first, second) = embed(model, batch.views)
        found = moments.barlow_moments(first, second)
        return Own(found.new_zeros(len(found)), found, h[0])

    def coupled(self, s: Tensor, n: int) -> Tensor:
        """All of the loss."""
        return moments.barlow_of(s, off_diagonal=self.off_diagonal)

    def settled(self, s: Tensor) -> Tensor:
        """With variances of at least 0 and correlations in [-1, 1]."""
        return moments.barlow_settled(s)

    def told(self, s: Tensor) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}
