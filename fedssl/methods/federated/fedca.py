"""FedCA: SimCLR with other clients' projections as further negatives, and an alignment on public examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import nt_xent
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.networks.keys import keys_of, spread
from fedssl.parts import Coupling, Part, Share


class Rows(nn.Module):
    """Vectors that travel; zeros stand for none.

    Attributes:
        rows: (..., D) float32.
    """

    rows: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(shape))


def rows_of(model: Model, part: str) -> Tensor:
    """The vectors that a part holds."""
    return cast(Rows, model[part]).rows


@dataclass(frozen=True)
class FedCA(SSLMethod):
    """FedCA (Zhang et al. 2020, https://arxiv.org/abs/2010.08982); the other half is the strategy of that name.

    The loss is SimCLR's NT-Xent with the dictionary, the projections that other clients have sent, among the candidates
    of every view, **never as positives**; before the first have come it is SimCLR. After training a client projects its
    examples, without augmentation, and uploads them: **one embedding of each single example leaves the client**, which
    is the point of the rule and why it runs only where payload.allow=[projections] says that the clients agree.

    What travels has a fixed size: `dictionary` examples of a client, at even distances if it has more; places without
    an example hold zeros and count for nothing. The projections are those of the trained model; the paper's are of its
    EMA, and the strategy averages them over rounds.

    With `alignment` (the paper's beta is 0.01) it adds `alignment * mean |f(x) - f_base(x)|^2` over public examples,
    where f_base was trained on them by the server. Only its projections travel.

    Attributes:
        temperature: of NT-Xent, above 0.
        dictionary: projections that each client sends.
        alignment: weight of the alignment; 0 needs no public examples.
        public_examples: of which the server sends projections, at most.
        public_batch: of them each batch is aligned with.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float = 0.5
    dictionary: int = 64
    alignment: float = 0.0
    public_examples: int = 512
    public_batch: int = 64
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2
    coupling: ClassVar[Coupling] = Coupling.history  # through the dictionary

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.alignment < 0:
            raise ConfigError("method.temperature must be above 0 and method.alignment, a weight, at least 0")
        if min(self.dictionary, self.public_examples, self.public_batch) < 1:
            raise ConfigError("method.dictionary, public_examples and public_batch are numbers of rows: give 1 or more")

    @property
    def reads_public(self) -> bool:
        """For an alignment."""
        return self.alignment > 0

    @property
    def public_limit(self) -> int:
        """As configured."""
        return self.public_examples

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder, projector, what is sent, what is received, and the base model's projections for an alignment."""
        target = (Part("target", trainable=False, share=Share.received),) if self.alignment else ()
        own = Part("projections", trainable=False, holds_examples=True)
        others = Part("dictionary", trainable=False, share=Share.received, holds_examples=True)
        return (Part("encoder"), Part("projector"), own, others, *target)

    @property
    def summaries(self) -> tuple[str, ...]:
        """The projections, and the dictionary that the strategy makes of them."""
        return ("projections", "dictionary")

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector, and places for vectors, which are empty."""
        model = nn.ModuleDict(
            {
                "encoder": encoder,
                "projector": mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers),
                "projections": Rows(self.dictionary, self.out),
                "dictionary": Rows(sizes.clients, self.dictionary, self.out),
            }
        )
        if self.alignment:
            model["target"] = Rows(sizes.public, self.out)
        return model

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """NT-Xent with the dictionary, and the alignment."""
        h, (first, second) = embed(model, batch.views)
        others = rows_of(model, "dictionary").flatten(0, 1)
        loss = nt_xent(first, second, others, temperature=self.temperature).mean()
        if not self.alignment or batch.public is None or batch.public_index is None:
            return LossOutput(loss, None, h[0], {})
        target = rows_of(model, "target")
        z = model["projector"](model["encoder"](batch.public))
        apart = (z - target[batch.public_index]).square().sum(1).mean() * target.any()  # 0 before the server has any
        return LossOutput(loss + self.alignment * apart, None, h[0], {"misalignment": apart.detach()})

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Project the examples, one row each."""
        chosen = spread(len(own), self.dictionary).to(generator.device)
        network = nn.Sequential(model["encoder"], model["projector"])
        rows = rows_of(model, "projections").zero_()
        rows[: len(chosen)] = keys_of(network, own, chosen, augment)
        return {}
