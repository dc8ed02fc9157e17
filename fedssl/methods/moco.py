"""MoCo: contrast against a queue of keys that an EMA teacher made for earlier batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from fedssl.errors import ConfigError
from fedssl.heads import mlp
from fedssl.losses import info_nce
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model, ema_, frozen
from fedssl.parts import Coupling, Part, Share
from fedssl.queue import KeyQueue


@dataclass(frozen=True)
class MoCo(SSLMethod):
    """MoCo v2 (He et al. 2020, https://arxiv.org/abs/1911.05722; Chen et al. 2020, https://arxiv.org/abs/2003.04297).

    The query is the student's projection of view 0, the positive the teacher's of view 1, the negatives are the queue
    alone. The queue holds embeddings of single examples, so it stays on its client and survives its rounds; keys from
    before a merge are stale, which a short queue forgets soon. Batch statistics can tell this batch's keys from older
    ones, which is why the authors shuffle batches across GPUs; a client has one device, so they stay. On the digits
    under label skew the head is better with them than without.
    """

    temperature: float = 0.2
    queue: int = 256
    decay: float = 0.99
    hidden: int = 128
    out: int = 64
    norm: str = "batch"
    views: ClassVar[int] = 2
    teacher: ClassVar[Part] = Part("teacher", trainable=False, share=Share.derived, follows=("encoder", "projector"))
    parts: ClassVar[tuple[Part, ...]] = (
        Part("encoder"),
        Part("projector"),
        teacher,
        Part("queue", trainable=False, share=Share.local, holds_examples=True),
    )
    coupling: ClassVar[Coupling] = Coupling.history

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ConfigError(
                f"method.decay={self.decay} is not a decay: it is the teacher's share of itself, in [0, 1]"
            )

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector, a teacher that starts equal to them, and an empty queue."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm)
        teacher = frozen({"encoder": encoder, "projector": projector})
        parts = {"encoder": encoder, "projector": projector, "teacher": teacher}
        return nn.ModuleDict({**parts, "queue": KeyQueue(self.queue, self.out)})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """InfoNCE of each query with its key and the queue."""
        h = model["encoder"](batch.views[0])  # (B, dim)
        query = model["projector"](h)  # (B, out)
        teacher = model["teacher"]
        with torch.no_grad():
            key = teacher.get_submodule("projector")(teacher.get_submodule("encoder")(batch.views[1]))  # (B, out)
        keys = cast(KeyQueue, model["queue"]).keys.clone()  # a later push must not change what backward reads
        loss = info_nce(query, key, keys, temperature=self.temperature).mean()
        return LossOutput(loss, None, h, {"keys": key.detach()})

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the teacher, and put its keys into the queue."""
        ema_(model, self.teacher, self.decay)
        cast(KeyQueue, model["queue"]).push(out.aux["keys"])
