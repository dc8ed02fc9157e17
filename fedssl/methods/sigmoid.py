"""Sigmoid pairs: each pair of views is its own yes-or-no question; no softmax over the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl import temperature as rules
from fedssl.losses import sigmoid_pair
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step, report
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class SigmoidPairs(SSLMethod):
    """The sigmoid loss (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) with negatives weighted by 1 / B.

    One example moves the loss by less than 4 / temperature however large the batch, where a softmax has no such bound:
    the contrastive loss that suits differential privacy best.

    Attributes:
        temperature: a number, or a word or rule of `fedssl.temperature`.
        bias: added to the logits.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float | str | rules.Rule = 0.2
    bias: float = 0.0
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def __post_init__(self) -> None:
        rules.rule(self.temperature)

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Positive and negative pairs of the two projections, mean over the batch."""
        h, (first, second) = embed(model, batch.views)
        t = rules.choose(rules.rule(self.temperature), first, second, None, step.progress, "cosine")
        loss = sigmoid_pair(first, second, temperature=t, bias=self.bias).mean()
        return LossOutput(loss, None, h[0], report(temperature=t))
