"""SimCLR: contrast two views of an example against the other examples of the batch, or against public ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedssl import temperature as rules
from fedssl.errors import ConfigError
from fedssl.losses import info_nce, nt_xent
from fedssl.losses.similarity import ready_for
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step, report
from fedssl.methods.common.negatives import PUBLIC, check_negatives, coupling_of, public_keys
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class SimCLR(SSLMethod):
    """SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): NT-Xent on a projector, local negatives only.

    With `negatives=public` the candidates of a view are its positive and public examples, of which no client owns any:
    then an example's loss reads no other one of the client's, which is what record-level privacy needs.

    The projector has batch normalisation, as in the authors' code. With a batch of one example there is nothing to
    contrast: without that normalisation the loss and its gradient are 0, with it such a batch is refused.

    Attributes:
        temperature: a number, a word (cosine, target_probability, max_snr) or a rule of `fedssl.temperature`.
        similarity: cosine or dot.
        negatives: batch, or public (data@public=NAME).
        public_batch: how many public examples each step draws.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float | str | rules.Rule = 0.5
    similarity: str = "cosine"
    negatives: str = "batch"
    public_batch: int = 64
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"))

    def __post_init__(self) -> None:
        ready_for(self.similarity)
        rules.rule(self.temperature)
        check_negatives(self.negatives, "batch")
        if self.public_batch < 1:
            raise ConfigError(f"method.public_batch={self.public_batch} draws no negatives: give at least 1")

    @property
    def coupling(self) -> Coupling:
        """`batch`; `none` with public negatives, unless a norm or a temperature reads the batch."""
        return coupling_of(self.negatives, self.norm, self.temperature, Coupling.batch)

    @property
    def reads_public(self) -> bool:
        """Public negatives need public examples."""
        return self.negatives == PUBLIC

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder and projector."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """NT-Xent of the two projections, or InfoNCE of both directions against public keys; mean over the batch."""
        h, (first, second) = embed(model, batch.views)
        keys = public_keys(nn.Sequential(model["encoder"], model["projector"]), batch) if self.reads_public else None
        t = rules.choose(rules.rule(self.temperature), first, second, keys, step.progress, self.similarity)
        if keys is None:
            each = nt_xent(first, second, temperature=t, similarity=self.similarity)
        else:
            ways = ((first, second), (second, first))
            both = [info_nce(a, b, keys, temperature=t, similarity=self.similarity) for a, b in ways]
            each = torch.stack(both).mean(0)  # (B,)
        own = each if self.coupling is Coupling.none else None
        return LossOutput(each.mean(), own, h[0], report(temperature=t))
