"""FedDecorr: any method, with a penalty on correlated features against dimensional collapse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedssl.losses import decorrelation
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class Decorrelated(SSLMethod):
    """A method whose loss has `weight` times FedDecorr's term of the encoder's features added.

    Shi et al. 2023, https://arxiv.org/abs/2210.00226: under label skew the features of clients collapse to few
    dimensions; the term is the squared Frobenius norm of their correlation matrix over the batch, so it couples the
    examples of a batch whatever the method. `local.decorrelation=0.1` asks for it.
    """

    method: SSLMethod
    weight: float

    @property
    def modalities(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the method, which an instance knows
        """Those of the method."""
        return self.method.modalities

    @property
    def views(self) -> int:
        """Those of the method."""
        return self.method.views

    @property
    def local_views(self) -> int:
        """Those of the method."""
        return self.method.local_views

    @property
    def reads_public(self) -> bool:
        """As the method."""
        return self.method.reads_public

    @property
    def summaries(self) -> tuple[str, ...]:
        """Those of the method."""
        return self.method.summaries

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the method."""
        return self.method.parts

    @property
    def coupling(self) -> Coupling:
        """At least `batch`."""
        return Coupling.history if self.method.coupling is Coupling.history else Coupling.batch

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """The method's model."""
        return self.method.init(encoder, sizes)

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The method's loss plus the weighted term, which is reported as `decorrelation`."""
        out = self.method.loss(model, batch, step)
        term = decorrelation(out.features)
        aux = {**out.aux, "decorrelation": term.detach()}
        return LossOutput(out.loss + self.weight * term, None, out.features, aux)

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """As the method."""
        self.method.after_step(model, out, step)

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """As the method."""
        self.method.after_merge(model, own, public, augment, step)

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """As the method."""
        return self.method.before_upload(model, own, public, augment, generator)
