"""VICReg: invariance of the two views, variance and decorrelation of the features; no negatives, no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl.heads import mlp
from fedssl.losses import vicreg
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class VICReg(SSLMethod):
    """VICReg (Bardes et al. 2022, https://arxiv.org/abs/2105.04906) with a three-layer expander.

    The terms are in `aux`, unweighted. An example's loss depends on its batch through the variances and covariances, so
    a batch of one example is refused.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    hidden: int = 128
    out: int = 128
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and expander."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=3)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The weighted sum of the three terms."""
        h = [model["encoder"](view) for view in batch.views]  # 2 x (B, dim)
        z = [model["projector"](x) for x in h]  # 2 x (B, out)
        terms = vicreg(*z, invariance=self.invariance, variance=self.variance, covariance=self.covariance)
        aux = {name: value.detach() for name, value in terms._asdict().items() if name != "total"}
        return LossOutput(terms.total, None, h[0], aux)
