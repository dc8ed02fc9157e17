"""FLESD: any method on clients of any architecture, that agree by how public examples lie to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import kullback_leibler, relations
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.methods.common.wrapper import Wrapper, check_projects, projected_width
from fedssl.methods.federated.fedca import Rows, rows_of
from fedssl.methods.simclr import SimCLR
from fedssl.model import Model
from fedssl.networks.keys import keys_of
from fedssl.parts import Part


@dataclass(frozen=True)
class FLESD(Wrapper):
    """FLESD (Shi et al. 2021, https://arxiv.org/abs/2109.14611) around any method with an encoder and a projector.

    After training a client uploads its projections of the public examples, and nothing else; the strategy of the same
    name makes a student of them, which is the run's model. Public examples are what data@public names and never a
    client's own, as in the authors' code by default.

    **The way back.** The authors let every client begin a round with the student's weights (`strategy.broadcast=true`),
    which clients of other architectures cannot. Those receive the student's projections of the public examples, and
    `pull` adds to their loss the divergence of how their own lie from how the student's do,
    `pull * KL(softmax(s_i / T) || softmax(z_i / T))` over the others of a batch of public examples, in the spirit of
    Hetero-SSFL (Makhija et al. 2022, https://arxiv.org/abs/2205.12493), which pulls by CKA. FedMKD sends networks
    instead, which this does not.

    Attributes:
        base: the local method.
        pull: weight of the way back, 0 or more; 0 drops it.
        temperature: T.
        public_examples: that are read, at most, spread over those there are.
        public_batch: of them, beside each batch.
    """

    base: SSLMethod = field(default_factory=SimCLR)
    pull: float = 1.0
    temperature: float = 0.1
    public_examples: int = 512
    public_batch: int = 64

    def __post_init__(self) -> None:
        check_projects(self.base, ("public",))
        if self.pull < 0 or not self.temperature > 0:
            raise ConfigError("method.pull is a weight, 0 or more, and method.temperature must be above 0")
        if min(self.public_examples, self.public_batch) < 2:
            raise ConfigError("method.public_examples and public_batch: of one example there is nothing to compare")

    @property
    def reads_public(self) -> bool:
        """Always."""
        return True

    @property
    def public_limit(self) -> int:
        """As configured."""
        return self.public_examples

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the base, and the projections of public examples."""
        return (*self.base.parts, Part("public", trainable=False))

    @property
    def summaries(self) -> tuple[str, ...]:
        """Those projections."""
        return (*self.base.summaries, "public")

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """The base's model, and no projections yet."""
        model = self.base.init(encoder, sizes)
        model["public"] = Rows(sizes.public, projected_width(model, sizes.dim))
        return model

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The base's loss of the client's own examples, and the pull on public ones, of which no own one reads."""
        out = self.base.loss(model, batch, step)
        if not self.pull or batch.public is None or batch.public_index is None:
            return out
        told = rows_of(model, "public")
        theirs, own = told[batch.public_index], model["projector"](model["encoder"](batch.public))
        ways = (relations(z, z, temperature=self.temperature) for z in (theirs, own))
        apart = kullback_leibler(*ways).mean() * told.any()  # 0 before the server has a say
        each = None if out.per_example is None else out.per_example + self.pull * apart
        aux = {**out.aux, "disagreement": apart.detach()}
        return replace(out, loss=out.loss + self.pull * apart, per_example=each, aux=aux)

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Project the public examples."""
        said = self.base.before_upload(model, own, public, augment, generator)
        if public is not None:
            network = nn.Sequential(model["encoder"], model["projector"])
            every = torch.arange(len(public), device=generator.device)
            rows_of(model, "public").copy_(keys_of(network, public, every, augment))
        return said
