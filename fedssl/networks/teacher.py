"""EMA teachers: their part, how fast they follow, and the forward pass without a gradient."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import Step, View
from fedssl.model import Model, ema_, frozen
from fedssl.parts import Part, Share
from fedssl.schedules import ema_decay

SCHEDULES = ("constant", "cosine", "adaptive")
TEACHER = Part("teacher", trainable=False, share=Share.derived, follows=("encoder", "projector"))
PACE = Part("pace", trainable=False, share=Share.local)
_MEMORY = 0.01  # of the running mean curvature: about the last 100 steps
_RANGE = 4.0  # the teacher moves at most so many times faster or slower than at the base decay


class Pace(nn.Module):
    """Remembers how curved the loss has been, so that a teacher follows faster where it is more curved than usual.

    The squared norm of the gradient stands for the curvature: for a loss that is a negative log-likelihood, as InfoNCE
    and DINO's are, its mean is the trace of the Fisher matrix, which equals the expected Hessian's (Zhang & Mitliagkas
    2017, https://arxiv.org/abs/1706.03471, use it so). It costs no second pass and no copy of the model.

    Attributes:
        mean: () float32, the running mean.
        seen: () int64, steps so far.
    """

    mean: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def decay(self, curvature: Tensor, base: float) -> Tensor:
        """() the decay for a step of this curvature: 1 - (1 - base) * clip(curvature / mean, 1/4, 4), in [0, 1]."""
        self.seen.add_(1)
        self.mean.lerp_(curvature.to(self.mean), torch.clamp(1 / self.seen, min=_MEMORY))
        ratio = torch.where(self.mean > 0, curvature / self.mean, 1.0).clamp(1 / _RANGE, _RANGE)
        return (1 - (1 - base) * ratio).clamp(0, 1)


def check_decay(decay: float, schedule: str) -> None:
    """Refuse a decay or a schedule that cannot be.

    Raises:
        ConfigError: a decay outside [0, 1] or an unknown schedule.
    """
    if not 0 <= decay <= 1:
        raise ConfigError(f"method.decay={decay} is not a decay: it is the teacher's share of itself, in [0, 1]")
    if schedule not in SCHEDULES:
        raise ConfigError(f"method.decay_schedule={schedule!r} is unknown: use {', '.join(SCHEDULES)}")


def teacher_parts(schedule: str) -> tuple[Part, ...]:
    """The parts of a teacher with this schedule: `adaptive` has a memory of its own."""
    return (TEACHER, PACE) if schedule == "adaptive" else (TEACHER,)


def teacher_modules(student: dict[str, nn.Module], schedule: str) -> dict[str, nn.Module]:
    """The modules of those parts: a teacher equal to the encoder and projector of `student`."""
    teacher: dict[str, nn.Module] = {"teacher": frozen({name: student[name] for name in TEACHER.follows})}
    return teacher | ({"pace": Pace()} if schedule == "adaptive" else {})


class Target(nn.Module):
    """The teacher of a model as one network: encoder, then projector."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.teacher = model["teacher"]

    @torch.no_grad()
    def forward(self, view: View) -> Tensor:
        """(B, D) the teacher's projection, without a gradient."""
        out: Tensor = self.teacher.get_submodule("projector")(self.teacher.get_submodule("encoder")(view))
        return out


@torch.no_grad()
def follow(model: Model, step: Step, decay: float, schedule: str) -> None:
    """Move the teacher towards the student after a step, at the pace of the schedule."""
    if schedule == "adaptive":
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        curvature = torch.stack([g.float().square().sum() for g in gradients] or [torch.zeros(())]).sum()
        ema_(model, TEACHER, cast(Pace, model["pace"]).decay(curvature, decay))
    else:
        ema_(model, TEACHER, ema_decay(step.progress, decay, schedule))
