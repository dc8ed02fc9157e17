"""What the library does not offer, because it only serves to show a collapse."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedssl.losses import negative_similarity
from fedssl.method import Batch, LossOutput, Sizes, Step
from fedssl.methods.byol import BYOL
from fedssl.model import Model
from fedssl.networks.heads import embed
from fedssl.parts import Part


@dataclass(frozen=True)
class FreeBYOL(BYOL):
    """BYOL without a teacher and without a stopped gradient: the student's two views pull each other together.

    The last row of FedEMA's ablation (Zhuang et al. 2022). Options of the teacher have no effect.
    """

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder, projector and predictor."""
        return Part("encoder"), Part("projector"), Part("predictor")

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """BYOL's model without the teacher."""
        model = BYOL.init(self, encoder, sizes)
        return nn.ModuleDict({part.name: model[part.name] for part in self.parts})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """2 - 2 cos between each view's prediction and the other's projection, differentiated through both."""
        h, z = embed(model, batch.views)
        forth, back = (
            negative_similarity(model["predictor"](z[i]), z[1 - i], similarity=self.similarity, stop_gradient=False)
            for i in (0, 1)
        )
        return LossOutput((2 + forth + back).mean(), None, h[0], {})

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Nothing follows."""
