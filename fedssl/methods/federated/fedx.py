"""FedX: any method, with a distillation from the model that a round began with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import jensen_shannon, nt_xent, relations
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step, View
from fedssl.methods.common.wrapper import Wrapper, check_projects, projected_width, shared_passes
from fedssl.methods.simclr import SimCLR
from fedssl.model import Model, frozen
from fedssl.networks.heads import mlp
from fedssl.networks.norms import discard_statistics
from fedssl.parts import Coupling, Part, Share

REFERENCE = Part("reference", trainable=False, share=Share.derived, follows=("encoder", "projector"), frozen=True)


@dataclass(frozen=True)
class FedX(Wrapper):
    """FedX (Han et al. 2022, https://arxiv.org/abs/2207.09158), around any method with an encoder and a projector.

    With z the local projections of the two views, g those of the reference, a copy of the model as the round began that
    is never moved, and h a predictor,

        loss = base + distillation * NT-Xent(h(z1), g2) + relational * (JS_local + JS_global).

    JS compares how the two views lie to anchors: in JS_local z1 and z2 to local projections of other examples, in
    JS_global h(z1) and h(z2) to the reference's. The anchors of an example are the other examples of its batch, seen in
    the second view: of a shuffled batch they are a random draw, as the authors' second batch is, at no further pass.

    The server does nothing special: the reference costs no bytes. Where a strategy blends a client's own model with the
    server's, as FedEMA does, the reference is the blend. The authors' local loss is NT-Xent at temperature 0.1 and all
    weights are 1.

    Attributes:
        base: the local method.
        distillation, relational: weights of the two kinds of term, 0 or more.
        temperature: of the distillation's NT-Xent.
        relation_temperature: of the softmax over anchors.
        hidden, norm: of h, which has two layers.
    """

    base: SSLMethod = field(default_factory=SimCLR)
    distillation: float = 1.0
    relational: float = 1.0
    temperature: float = 0.1
    relation_temperature: float = 0.1
    hidden: int = 128
    norm: str = "batch"

    def __post_init__(self) -> None:
        check_projects(self.base, ("bridge", REFERENCE.name))
        if min(self.distillation, self.relational) < 0:
            raise ConfigError("method.distillation and relational are weights of losses: give 0 or more")
        if min(self.temperature, self.relation_temperature) <= 0:
            raise ConfigError("method.temperature and relation_temperature divide similarities: give more than 0")

    @property
    def views(self) -> int:
        """At least two."""
        return max(2, self.base.views)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the base, the predictor and the reference."""
        return (*self.base.parts, Part("bridge"), REFERENCE)

    @property
    def coupling(self) -> Coupling:
        """At least `batch`: of negatives and anchors."""
        return Coupling.history if self.base.coupling is Coupling.history else Coupling.batch

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """The base's model, a predictor of its projections, and a copy of encoder and projector."""
        model = self.base.init(encoder, sizes)
        width = projected_width(model, sizes.dim)
        model["bridge"] = mlp(width, self.hidden, width, norm=self.norm)
        model[REFERENCE.name] = frozen({name: model[name] for name in REFERENCE.follows})
        return model

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The base's loss and the three terms, which are reported."""
        model = shared_passes(model)
        out = self.base.loss(model, batch, step)
        z = [model["projector"](model["encoder"](view)) for view in batch.views[:2]]  # 2 x (B, D), not passed again
        h = [model["bridge"](x) for x in z]
        told = _told(cast(nn.ModuleDict, model[REFERENCE.name]), batch.views[1])  # (B, D)
        distilled = nt_xent(h[0], told, temperature=self.temperature).mean()
        near, far = (self._disagreement(*pair) for pair in ((z[0], z[1], z[1]), (h[0], h[1], told)))
        loss = out.loss + self.distillation * distilled + self.relational * (near + far)
        terms = {"distillation": distilled, "relational_local": near, "relational_global": far}
        aux = {**out.aux, **{name: value.detach() for name, value in terms.items()}}
        return LossOutput(loss, None, out.features, aux)

    def _disagreement(self, first: Tensor, second: Tensor, anchors: Tensor) -> Tensor:
        """() the mean divergence of how two views lie to anchors."""
        ways = (relations(view, anchors, temperature=self.relation_temperature) for view in (first, second))
        return jensen_shannon(*ways).mean()


@torch.no_grad()
def _told(reference: nn.ModuleDict, view: View) -> Tensor:
    """The reference's projections of a view; its running statistics stay as they are."""
    out: Tensor = reference["projector"](reference["encoder"](view))
    discard_statistics(reference)
    return out
