"""SimCLR: contrast two views of an example against the other examples of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl import temperature as rules
from fedssl.heads import embed, mlp
from fedssl.losses import nt_xent
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step, report
from fedssl.model import Model
from fedssl.parts import Coupling, Part
from fedssl.similarity import ready_for


@dataclass(frozen=True)
class SimCLR(SSLMethod):
    """SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): NT-Xent on a projector, local negatives only.

    The projector has batch normalisation, as in the authors' code. With a batch of one example there is nothing to
    contrast: without that normalisation the loss and its gradient are 0, with it such a batch is refused.

    Attributes:
        temperature: a number, a word (cosine, target_probability, max_snr) or a rule of `fedssl.temperature`.
        similarity: cosine or dot.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float | str | rules.Rule = 0.5
    similarity: str = "cosine"
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def __post_init__(self) -> None:
        ready_for(self.similarity)
        rules.rule(self.temperature)

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """NT-Xent of the two projections, mean over the batch."""
        h, (first, second) = embed(model, batch.views)
        t = rules.choose(rules.rule(self.temperature), first, second, None, step.progress, self.similarity)
        loss = nt_xent(first, second, temperature=t, similarity=self.similarity).mean()
        return LossOutput(loss, None, h[0], report(temperature=t))
