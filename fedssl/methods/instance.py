"""Instance discrimination: recognise each example among all of the client's, by a memory bank of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl import temperature as rules
from fedssl.errors import ConfigError
from fedssl.losses import info_nce, instance_discrimination
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step, report
from fedssl.methods.common.negatives import PUBLIC, check_negatives, coupling_of
from fedssl.model import Model
from fedssl.networks.heads import mlp
from fedssl.networks.keys import KeyBank, check_on_merge
from fedssl.parts import Coupling, Part, Share


@dataclass(frozen=True)
class InstanceDiscrimination(SSLMethod):
    """Instance discrimination (Wu et al. 2018, https://arxiv.org/abs/1805.01978) with the full softmax.

    Each example is a class of its own, whose weight is the key stored for it. The bank has one key an example, so its
    size is the client's, and it stays on its client. `theory.imprint_classifier` makes a classifier of such keys.

    With `negatives=public` the bank holds public examples alone, whose keys the merged weights make anew as each round
    begins. Nothing of the client's own examples may be stored then, so an example's own key is that of a second view.

    Attributes:
        temperature: a number, or a word or rule of `fedssl.temperature`; rules see the bank as negatives.
        negatives: own, the keys of all the client's examples; or public (data@public=NAME).
        momentum: a stored key's share of itself when its example is seen, in [0, 1].
        on_merge: keep the stale keys, clear them, or reencode all examples with the merged weights. A bank that was
            never filled is always filled first.
        hidden, out, layers, norm: of the projector.
    """

    modalities: ClassVar[tuple[str, ...]] = ("images", "timeseries", "graphs")  # of a pair it would see one only
    temperature: float | str | rules.Rule = 0.1
    negatives: str = "own"
    momentum: float = 0.5
    on_merge: str = "keep"
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"

    def __post_init__(self) -> None:
        rules.rule(self.temperature)
        check_on_merge(self.on_merge)
        check_negatives(self.negatives, "own")
        if not 0 <= self.momentum <= 1:
            raise ConfigError(f"method.momentum={self.momentum} is a stored key's share of itself: give it in [0, 1]")

    @property
    def views(self) -> int:
        """One; two where the second makes an example's own key."""
        return 2 if self.reads_public else 1

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder, projector, and the bank, which stays at home."""
        own = not self.reads_public
        bank = Part("bank", trainable=False, share=Share.local, holds_examples=own, sized=own)
        return (Part("encoder"), Part("projector"), bank)

    @property
    def coupling(self) -> Coupling:
        """`history`; with public negatives `none`, unless a norm or a temperature reads the batch."""
        return coupling_of(self.negatives, self.norm, self.temperature, Coupling.history)

    @property
    def reads_public(self) -> bool:
        """Public negatives need public examples."""
        return self.negatives == PUBLIC

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector and a bank without keys."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        bank = KeyBank(sizes.public if self.reads_public else sizes.examples, self.out)
        return nn.ModuleDict({"encoder": encoder, "projector": projector, "bank": bank})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Cross-entropy of each example's own key among all keys of the bank, in which public ones are others."""
        h = model["encoder"](batch.views[0])  # (B, dim)
        z = model["projector"](h)  # (B, out)
        bank = cast(KeyBank, model["bank"]).keys.clone()  # a later update must not change what backward reads
        if self.reads_public:
            with torch.no_grad():
                key = model["projector"](model["encoder"](batch.views[1]))
            t = rules.choose(rules.rule(self.temperature), z, key, bank, step.progress, "cosine")
            each = info_nce(z, key, bank, temperature=t)  # (B,)
            return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h, report(temperature=t))
        t = self._temperature(z, bank, batch.index, step)
        loss = instance_discrimination(z, bank, batch.index, temperature=t).mean()
        return LossOutput(loss, None, h, {"keys": z.detach(), "index": batch.index, **report(temperature=t)})

    @torch.no_grad()
    def _temperature(self, z: Tensor, bank: Tensor, index: Tensor, step: Step) -> float | Tensor:
        """The number, or what the rule makes of the similarities; an example's own key is not its negative."""
        chosen = rules.rule(self.temperature)
        if isinstance(chosen, float):
            return chosen
        scores = F.normalize(z.float(), dim=1) @ bank.T  # (B, n)
        own = scores.gather(1, index[:, None])
        return chosen.at(own[:, 0], scores.scatter(1, index[:, None], -torch.inf), step.progress)

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the keys of the batch's examples towards what was just seen."""
        if not self.reads_public:
            cast(KeyBank, model["bank"]).update(out.aux["keys"], out.aux["index"], self.momentum)

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """Fill a new bank; keep, clear or reencode an old one; fill one of public keys anew."""
        student, bank = nn.Sequential(model["encoder"], model["projector"]), cast(KeyBank, model["bank"])
        if not self.reads_public:
            bank.refresh(self.on_merge, student, own, augment)
        elif public is not None:
            bank.refresh("reencode", student, public, augment)
