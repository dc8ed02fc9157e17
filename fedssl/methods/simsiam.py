"""SimSiam: predict one view from the other, with a stopped gradient and no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl.heads import mlp
from fedssl.losses import negative_cosine
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class SimSiam(SSLMethod):
    """SimSiam (Chen & He 2021, https://arxiv.org/abs/2011.10566).

    The projector ends in a normalisation, the predictor is a bottleneck, both as in the paper's section 3. With
    `norm=batch` an example's loss depends on its batch; `group`, `layer` and `none` make it depend on itself alone,
    given an encoder without batch normalisation.
    """

    hidden: int = 128
    out: int = 128
    bottleneck: int = 32
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"), Part("predictor"))

    @property
    def coupling(self) -> Coupling:
        """`batch` through batch normalisation, else `none`."""
        return Coupling.batch if self.norm == "batch" else Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector with a last normalisation, bottleneck predictor."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, norm_last=True)
        predictor = mlp(self.out, self.bottleneck, self.out, norm=self.norm)
        return nn.ModuleDict({"encoder": encoder, "projector": projector, "predictor": predictor})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean of the two negative cosines, in [-1, 1]; -1 also for a collapsed network."""
        h = [model["encoder"](view) for view in batch.views]  # 2 x (B, dim)
        z = [model["projector"](x) for x in h]  # 2 x (B, out)
        p = [model["predictor"](x) for x in z]  # 2 x (B, out)
        each = (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2  # (B,)
        return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h[0], {})
