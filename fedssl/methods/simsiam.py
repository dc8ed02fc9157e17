"""SimSiam: predict one view from the other, with a stopped gradient and no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fedssl.losses import negative_similarity
from fedssl.losses.similarity import ready_for
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class SimSiam(SSLMethod):
    """SimSiam (Chen & He 2021, https://arxiv.org/abs/2011.10566).

    The projector ends in a normalisation, the predictor is a bottleneck, both as in the paper's section 3. With
    `norm=batch` an example's loss depends on its batch; `group`, `layer` and `none` make it depend on itself alone,
    given an encoder without batch normalisation.

    Attributes:
        similarity: cosine, or dot, whose loss is not bounded below.
        predictor, stop_gradient: false switches them off, as in the paper's ablations (sections 4.1 and 4.2).
        hidden, out, layers, norm: of the projector.
        bottleneck: hidden width of the predictor.
    """

    similarity: str = "cosine"
    predictor: bool = True
    stop_gradient: bool = True
    hidden: int = 128
    out: int = 128
    layers: int = 2
    bottleneck: int = 32
    norm: str = "batch"
    views: ClassVar[int] = 2

    def __post_init__(self) -> None:
        ready_for(self.similarity)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder and projector, and a predictor unless it is switched off."""
        return (Part("encoder"), Part("projector"), *((Part("predictor"),) if self.predictor else ()))

    @property
    def coupling(self) -> Coupling:
        """`batch` through batch normalisation, else `none`."""
        return Coupling.batch if self.norm == "batch" else Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector with a last normalisation, bottleneck predictor."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers, norm_last=True)
        model = nn.ModuleDict({"encoder": encoder, "projector": projector})
        if self.predictor:
            model["predictor"] = mlp(self.out, self.bottleneck, self.out, norm=self.norm)
        return model

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean of the two negative similarities; with cosine in [-1, 1], and -1 also for a collapsed network."""
        h, z = embed(model, batch.views)
        p = [model["predictor"](x) for x in z] if self.predictor else z
        options: dict[str, Any] = {"similarity": self.similarity, "stop_gradient": self.stop_gradient}
        each = (negative_similarity(p[0], z[1], **options) + negative_similarity(p[1], z[0], **options)) / 2  # (B,)
        return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h[0], {})
