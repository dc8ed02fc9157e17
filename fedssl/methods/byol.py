"""BYOL: predict an EMA teacher's projection of the other view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedssl.errors import ConfigError
from fedssl.heads import mlp
from fedssl.losses import negative_cosine
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model, ema_, frozen
from fedssl.parts import Coupling, Part, Share
from fedssl.schedules import ema_decay


@dataclass(frozen=True)
class BYOL(SSLMethod):
    """BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733).

    The loss is the paper's 2 - 2 cos, mean of both directions, in [0, 4]; 0 also for a collapsed network. Between
    rounds the teacher is `derived`: rebuilt from the merged student at no cost in bytes; `share.teacher=local` keeps
    each client's own, `share.teacher=merge` averages them on the server.
    """

    hidden: int = 128
    out: int = 64
    norm: str = "batch"
    decay: float = 0.99
    decay_schedule: str = "cosine"
    views: ClassVar[int] = 2
    teacher: ClassVar[Part] = Part("teacher", trainable=False, share=Share.derived, follows=("encoder", "projector"))
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"), Part("projector"), Part("predictor"), teacher)

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ConfigError(
                f"method.decay={self.decay} is not a decay: it is the teacher's share of itself, in [0, 1]"
            )
        if self.decay_schedule not in ("cosine", "constant"):
            raise ConfigError(f"method.decay_schedule={self.decay_schedule!r} is unknown: use cosine or constant")

    @property
    def coupling(self) -> Coupling:
        """`batch` through batch normalisation, else `none`."""
        return Coupling.batch if self.norm == "batch" else Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector, predictor, and a teacher that starts equal to the student."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm)
        predictor = mlp(self.out, self.hidden, self.out, norm=self.norm)
        teacher = frozen({"encoder": encoder, "projector": projector})
        return nn.ModuleDict({"encoder": encoder, "projector": projector, "predictor": predictor, "teacher": teacher})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean of the two normalised squared distances between prediction and teacher."""
        h = [model["encoder"](view) for view in batch.views]  # 2 x (B, dim)
        p = [model["predictor"](model["projector"](x)) for x in h]  # 2 x (B, out)
        teacher = model["teacher"]
        with torch.no_grad():
            t = [teacher.get_submodule("projector")(teacher.get_submodule("encoder")(v)) for v in batch.views]
        each = 2 + negative_cosine(p[0], t[1]) + negative_cosine(p[1], t[0])  # (B,)
        return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h[0], {})

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the teacher towards the student."""
        ema_(model, self.teacher, ema_decay(step.progress, self.decay, self.decay_schedule))
