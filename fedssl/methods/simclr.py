"""SimCLR: contrast two views of an example against the other examples of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl.heads import mlp
from fedssl.losses import nt_xent
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class SimCLR(SSLMethod):
    """SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): NT-Xent on a projector, local negatives only.

    The projector has batch normalisation, as in the authors' code. With a batch of one example there is nothing to
    contrast: without that normalisation the loss and its gradient are 0, with it such a batch is refused.
    """

    temperature: float = 0.5
    hidden: int = 128
    out: int = 64
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and a two-layer projector."""
        return nn.ModuleDict({"encoder": encoder, "projector": mlp(sizes.dim, self.hidden, self.out, norm=self.norm)})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """NT-Xent of the two projections, mean over the batch."""
        h = [model["encoder"](view) for view in batch.views]  # 2 x (B, dim)
        z = [model["projector"](x) for x in h]  # 2 x (B, out)
        loss = nt_xent(z[0], z[1], temperature=self.temperature).mean()
        return LossOutput(loss, None, h[0], {})
