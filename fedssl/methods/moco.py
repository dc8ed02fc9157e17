"""MoCo: contrast against a queue of keys that an EMA teacher made for earlier batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from fedssl import temperature as rules
from fedssl.losses import info_nce
from fedssl.losses.similarity import ready_for
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step, report
from fedssl.methods.common.negatives import PUBLIC, check_negatives, coupling_of
from fedssl.modalities.pairs import two_modalities
from fedssl.model import Model
from fedssl.networks.heads import mlp
from fedssl.networks.keys import KeyQueue, check_on_merge, keys_of
from fedssl.networks.teacher import Target, check_decay, follow, teacher_modules, teacher_parts
from fedssl.parts import Coupling, Part, Share


@dataclass(frozen=True)
class MoCo(SSLMethod):
    """MoCo v2 (He et al. 2020, https://arxiv.org/abs/1911.05722; Chen et al. 2020, https://arxiv.org/abs/2003.04297).

    The query is the student's projection of view 0, the positive the teacher's of view 1, the negatives are the queue
    alone; with two modalities each asks for the other, so that both towers learn. The queue holds embeddings of single
    examples, so it stays on its client and survives its rounds. Batch statistics can tell this batch's keys from older
    ones, which is why the authors shuffle batches across GPUs; a client has one device, so they stay. On the digits
    under label skew the head is better with them than without.

    With `negatives=public` the queue holds keys of public examples alone, which the merged teacher makes anew as each
    round begins, and steps do not change: then an example's loss reads no other one of the client's.

    Attributes:
        temperature: a number, a word (cosine, target_probability, max_snr) or a rule of `fedssl.temperature`.
        similarity: cosine or dot.
        negatives: own, keys of earlier batches; or public (data@public=NAME).
        queue: keys held.
        on_merge: what a client does with keys of before a merge, which are stale: keep them, clear them, or reencode
            their examples with the merged teacher.
        decay, decay_schedule: of the teacher: constant, cosine or adaptive.
        hidden, out, layers, norm: of the projector.
    """

    temperature: float | str | rules.Rule = 0.2
    similarity: str = "cosine"
    negatives: str = "own"
    queue: int = 256
    on_merge: str = "keep"
    decay: float = 0.99
    decay_schedule: str = "constant"
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2

    def __post_init__(self) -> None:
        ready_for(self.similarity)
        rules.rule(self.temperature)
        check_decay(self.decay, self.decay_schedule)
        check_on_merge(self.on_merge)
        check_negatives(self.negatives, "own")

    @property
    def coupling(self) -> Coupling:
        """`history`; with public negatives `none`, unless a norm, a temperature or an adaptive decay reads more."""
        if self.decay_schedule == "adaptive":
            return Coupling.history
        return coupling_of(self.negatives, self.norm, self.temperature, Coupling.history)

    @property
    def reads_public(self) -> bool:
        """Public negatives need public examples."""
        return self.negatives == PUBLIC

    @property
    def public_limit(self) -> int | None:
        """No more than the queue holds."""
        return self.queue if self.reads_public else None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder and projector, their teacher, and the queue, which stays at home."""
        queue = Part("queue", trainable=False, share=Share.local, holds_examples=not self.reads_public)
        return (Part("encoder"), Part("projector"), *teacher_parts(self.decay_schedule), queue)

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector, a teacher that starts equal to them, and an empty queue."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        student: dict[str, nn.Module] = {"encoder": encoder, "projector": projector}
        teacher = teacher_modules(student, self.decay_schedule)
        held = min(self.queue, sizes.public) if sizes.public else self.queue
        return nn.ModuleDict({**student, **teacher, "queue": KeyQueue(held, self.out)})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """InfoNCE of each query with its key and the queue."""
        order = (0, 1) if two_modalities(batch.views) else (0,)
        target = Target(model)
        h = [model["encoder"](batch.views[i]) for i in order]  # each (B, dim)
        query = torch.cat([model["projector"](x) for x in h])  # (B, out), or (2B, out)
        key = torch.cat([target(batch.views[1 - i]) for i in order])
        keys = cast(KeyQueue, model["queue"]).keys.clone()  # a later push must not change what backward reads
        t = rules.choose(rules.rule(self.temperature), query, key, keys, step.progress, self.similarity)
        each = info_nce(query, key, keys, temperature=t, similarity=self.similarity)  # (B,), or (2B,)
        own = each.view(len(order), -1).mean(0) if self.coupling is Coupling.none else None
        index = batch.index.repeat(len(order))
        return LossOutput(each.mean(), own, h[0], {"keys": key, "index": index, **report(temperature=t)})

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the teacher, and put its keys into a queue of its own."""
        follow(model, step, self.decay, self.decay_schedule)
        if not self.reads_public:
            cast(KeyQueue, model["queue"]).push(out.aux["keys"], out.aux["index"])

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """Keep, clear or reencode the queue; fill one of public keys anew."""
        queue = cast(KeyQueue, model["queue"])
        if not self.reads_public:
            queue.refresh(self.on_merge, Target(model), own, augment)
        elif public is not None:
            every = torch.arange(len(public), device=queue.keys.device)
            queue.push(keys_of(Target(model), public, every, augment), every)
