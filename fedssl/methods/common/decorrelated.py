"""FedDecorr: any method, with a penalty on correlated features against dimensional collapse."""

from __future__ import annotations

from dataclasses import dataclass

from fedssl.losses import decorrelation
from fedssl.method import Batch, LossOutput, Step
from fedssl.methods.common.wrapper import Wrapper
from fedssl.model import Model
from fedssl.parts import Coupling


@dataclass(frozen=True)
class Decorrelated(Wrapper):
    """A method whose loss has `weight` times FedDecorr's term of the encoder's features added.

    Shi et al. 2023, https://arxiv.org/abs/2210.00226: under label skew the features of clients collapse to few
    dimensions; the term is the squared Frobenius norm of their correlation matrix over the batch, so it couples the
    examples of a batch whatever the method. `local.decorrelation=0.1` asks for it.
    """

    weight: float

    @property
    def coupling(self) -> Coupling:
        """At least `batch`."""
        return Coupling.history if self.base.coupling is Coupling.history else Coupling.batch

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The base's loss plus the weighted term, which is reported as `decorrelation`."""
        out = self.base.loss(model, batch, step)
        term = decorrelation(out.features)
        aux = {**out.aux, "decorrelation": term.detach()}
        return LossOutput(out.loss + self.weight * term, None, out.features, aux)
