"""DINO: match an EMA teacher's distribution over prototypes, kept apart by centring and sharpening."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import dino
from fedssl.losses.decomposed import BATCH_NORM, Own
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.heads import mlp
from fedssl.networks.norms import discard_statistics
from fedssl.networks.teacher import Target, check_decay, follow, teacher_modules, teacher_parts
from fedssl.parts import Coupling, Part, Share

CENTERS = ("running", "public", "none")
_PIECE = 512  # public examples passed at a time


class PrototypeHead(nn.Module):
    """Projector, then the cosine with each prototype: (B, inputs) -> (B, prototypes), each in [-1, 1]."""

    def __init__(self, projector: nn.Sequential, out: int, prototypes: int) -> None:
        super().__init__()
        self.projector = projector
        self.prototypes = nn.Linear(out, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.projector(x), dim=1), F.normalize(self.prototypes.weight, dim=1))


class Center(nn.Module):
    """The mean teacher output, which is subtracted so that no prototype wins everywhere.

    Attributes:
        value: (prototypes,) float32.
    """

    value: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(prototypes))


def _center(model: Model) -> Tensor:
    return cast(Center, model["center"]).value


@dataclass(frozen=True)
class DINO(SSLMethod):
    """DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

    The centre is a part of its own. `center=running` follows the client's batches and stays local, or is merged with
    `strategy.share.center=merge`; `center=public` is the mean over public examples (data@public=NAME) at the start of
    each round, so it tells nothing of the client's own and leaves examples uncoupled; `none` drops it.

    Attributes:
        prototypes: number of outputs of the head.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, after the warm-up.
        teacher_temperature_start, teacher_temperature_warmup: where it starts, and the share of the run in which it
            rises linearly.
        center: running, public or none.
        center_momentum: the running centre's share of itself at each step.
        local_views: views of small crops, which the student sees and the teacher does not (multi-crop).
        decay, decay_schedule: of the teacher: constant, cosine (to 1) or adaptive.
        hidden, out, layers, norm: of the projector below the prototypes.
    """

    prototypes: int = 128
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: float = 0.3
    center: str = "running"
    center_momentum: float = 0.9
    local_views: int = 0
    decay: float = 0.99
    decay_schedule: str = "cosine"
    hidden: int = 128
    out: int = 64
    layers: int = 2
    norm: str = "batch"
    views: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_decay(self.decay, self.decay_schedule)
        if self.center not in CENTERS:
            raise ConfigError(f"method.center={self.center!r} is unknown: use {', '.join(CENTERS)}")
        if min(self.student_temperature, self.teacher_temperature, self.teacher_temperature_start) <= 0:
            raise ConfigError("method: DINO's temperatures divide its outputs, so each must be above 0")
        if not (0 <= self.center_momentum <= 1 and 0 <= self.teacher_temperature_warmup <= 1):
            raise ConfigError("method.center_momentum and teacher_temperature_warmup are shares: give them in [0, 1]")
        if self.local_views < 0 or self.prototypes < 2:
            raise ConfigError("method.local_views must be at least 0 and method.prototypes at least 2")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Encoder, projector with prototypes, teacher, and the centre."""
        center = () if self.center == "none" else (Part("center", trainable=False, share=Share.local),)
        return (Part("encoder"), Part("projector"), *teacher_parts(self.decay_schedule), *center)

    @property
    def coupling(self) -> Coupling:
        """`history` through a running centre or an adaptive decay, `batch` through batch normalisation, else `none`."""
        if self.center == "running" or self.decay_schedule == "adaptive":
            return Coupling.history
        return Coupling.batch if self.norm == "batch" else Coupling.none

    @property
    def reads_public(self) -> bool:
        """A public centre needs public examples."""
        return self.center == "public"

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """Encoder, projector with prototypes, a teacher equal to both, and a centre of zeros."""
        projector = mlp(sizes.dim, self.hidden, self.out, norm=self.norm, layers=self.layers)
        student: dict[str, nn.Module] = {
            "encoder": encoder,
            "projector": PrototypeHead(projector, self.out, self.prototypes),
        }
        center = {} if self.center == "none" else {"center": Center(self.prototypes)}
        return nn.ModuleDict({**student, **teacher_modules(student, self.decay_schedule), **center})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean cross-entropy over all pairs of a teacher's view and another view of the student's."""
        each, outputs, h = self._each(model, batch, step)
        aux = {"mean": outputs.mean(0)} if self.center == "running" else {}
        return LossOutput(each.mean(), each if self.coupling is Coupling.none else None, h, aux)

    def _each(self, model: Model, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), the teacher's mean outputs (B, prototypes), and features (B, dim) of view 0."""
        h = [model["encoder"](view) for view in batch.views]  # (2 + local_views) x (B, dim)
        student = [model["projector"](x) for x in h]  # each (B, prototypes)
        target = Target(model)
        teacher = [target(view) for view in batch.views[:2]]
        center = _center(model).clone() if "center" in model else torch.zeros_like(teacher[0][0])
        pairs = [
            dino(s, t, center, student_temperature=self.student_temperature, teacher_temperature=self._sharpness(step))
            for i, t in enumerate(teacher)
            for j, s in enumerate(student)
            if i != j
        ]
        return torch.stack(pairs).mean(0), torch.stack(teacher).mean(0), h[0]

    def _sharpness(self, step: Step) -> float:
        if step.progress >= self.teacher_temperature_warmup:
            return self.teacher_temperature
        share = step.progress / self.teacher_temperature_warmup
        return self.teacher_temperature_start + share * (self.teacher_temperature - self.teacher_temperature_start)

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """Move the teacher, and a running centre."""
        follow(model, step, self.decay, self.decay_schedule)
        if self.center == "running":
            center = _center(model)
            center.lerp_(out.aux["mean"].to(center), 1 - self.center_momentum)

    @torch.no_grad()
    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """Take a public centre anew from the merged teacher."""
        if self.center == "public" and public is not None:
            target, index = Target(model), torch.arange(len(public), device=next(model.parameters()).device)
            pieces = torch.tensor_split(index, max(1, -(-len(index) // _PIECE)))
            total = sum(target(augment.plain(public.batch(piece))).float().sum(0) for piece in pieces)
            _center(model).copy_(torch.as_tensor(total) / len(public))
            discard_statistics(model)

    @property
    def length(self) -> int:
        """The prototypes."""
        return self.prototypes

    @property
    def matrix(self) -> int:
        """The statistic is a vector."""
        return 0

    @property
    def undecomposed(self) -> str:
        """A teacher whose decay remembers, and batch normalisation."""
        if self.decay_schedule == "adaptive":
            return "adapts its teacher's decay to past batches: set method.decay_schedule=constant"
        return BATCH_NORM if self.norm == "batch" else ""

    def own(self, model: Model, batch: Batch, step: Step, n: int) -> Own:
        """All of the loss, whose centre is of earlier releases; and what moves the centre: the teacher's outputs."""
        each, outputs, h = self._each(model, batch, step)
        return Own(each, outputs, h)

    def coupled(self, s: Tensor, n: int) -> Tensor:
        """Nothing: this step's centre is the last one's."""
        return s.sum() * 0

    def settled(self, s: Tensor) -> Tensor:
        """In [-1, 1], where cosines are."""
        return s.clamp(-1, 1)

    def told(self, s: Tensor) -> Mapping[str, Tensor]:
        """The mean that a running centre follows."""
        return {"mean": s} if self.center == "running" else {}
