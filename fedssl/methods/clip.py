"""CLIP: contrast two modalities, or two views, of the batch's examples with each other in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl.losses import clip
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class CLIP(SSLMethod):
    """CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): symmetric InfoNCE between view 0 and view 1.

    Row i of one view finds its partner among all rows of the other; unlike SimCLR's, rows of one view are no candidates
    of each other. The temperature is fixed where the paper learns it, and one projector reads both views where the
    paper has a linear map for each modality. Examples of one class in a batch are false negatives.

    Attributes:
        temperature: > 0.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float = 0.1
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))
    coupling: ClassVar[Coupling] = Coupling.batch

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Symmetric InfoNCE of the two projections, mean over the batch."""
        h, (first, second) = embed(model, batch.views)
        return LossOutput(clip(first, second, temperature=self.temperature).mean(), None, h[0], {})
