"""BYOL: predict an EMA teacher's projection of the other view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedssl.losses import negative_similarity
from fedssl.losses.similarity import ready_for
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import embed, mlp
from fedssl.networks.teacher import Target, check_decay, follow, teacher_modules, teacher_parts
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class BYOL(SSLMethod):
    """BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733).

    The loss is the paper's 2 - 2 cos, mean of both directions, in [0, 4]; 0 also for a collapsed network. Between
    rounds the teacher is `derived`: rebuilt from the merged student at no cost in bytes; `share.teacher=local` keeps
    each client's own, `share.teacher=merge` averages them on the server.

    Attributes:
        similarity: cosine, or dot, whose loss is not bounded below.
        predictor: false switches it off, as in the paper's ablation (table 5b).
        hidden, out, layers, norm: of the projector; the predictor has `hidden` and `norm` as well.
        decay: the teacher's share of itself at each step.
        decay_schedule: constant, cosine (from `decay` to 1) or adaptive (faster where the loss is more curved).
    """

    similarity: str = "cosine"
    predictor: bool = True
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    decay: float = 0.99
    decay_schedule: str = "cosine"
    views: ClassVar[int] = 2

    def __post_init__(self) -> None:
        ready_for(self.similarity)
        check_decay(self.decay, self.decay_schedule)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder, projector, a predictor unless it is switched off, and the teacher."""
        predictor = (Part("predictor"),) if self.predictor else ()
        return (Part("encoder"), Part("projector"), *predictor, *teacher_parts(self.decay_schedule))

    @property
    def coupling(self) -> Coupling:
        """`history` through an adaptive decay, `batch` through batch normalisation, else `none`."""
        if self.decay_schedule == "adaptive":
            return Coupling.history
        return Coupling.batch if self.norm == "batch" else Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector, predictor, and a teacher that starts equal to the student."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        student: dict[str, nn.Module] = {"encoder": encoder, "projector": projector}
        predictor = {"predictor": mlp(self.out, self.hidden, self.out, norm=self.norm)} if self.predictor else {}
        return nn.ModuleDict({**student, **predictor, **teacher_modules(student, self.decay_schedule)})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean of the two normalised squared distances between prediction and teacher."""
        h, z = embed(model, batch.views)
        p = [model["predictor"](x) for x in z] if self.predictor else z
        target = Target(model)
        t = [target(view) for view in batch.views]
        forth, back = (negative_similarity(p[i], t[1 - i], similarity=self.similarity) for i in (0, 1))
        each = 2 + forth + back  # (B,)
        return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h[0], {})

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the teacher towards the student."""
        follow(model, step, self.decay, self.decay_schedule)
