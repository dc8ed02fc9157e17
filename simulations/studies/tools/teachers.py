"""T9 on one machine: students and teachers recorded at every step, and a BYOL that reports its teacher's lag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedssl import config, seeds
from fedssl.client import fit
from fedssl.gradient import PlainGradient
from fedssl.job.setup import build_model, data_of
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.methods.byol import BYOL
from fedssl.model import Model, derive, pairs
from fedssl.networks.teacher import TEACHER
from fedssl.parts import Coupling, Part
from fedssl.theory import ema_lag, ema_teacher
from simulations.studies.tools.runs import CENTRAL, CPU, QUICK

Array = NDArray[np.float64]
_KEPT = 4000  # of about 80,000 weights, drawn at random: distances of all are estimated from these


def _weights(model: Model) -> Iterator[tuple[Tensor, Tensor]]:
    """(teacher's, student's) trained arrays; running statistics are left out."""
    for follower, followed in pairs(model, TEACHER):
        if followed.requires_grad:
            yield follower, followed


@dataclass(frozen=True)
class WatchedBYOL(BYOL):
    """BYOL that reports `lag`: the distance of the teacher's weights from the student's, mean over a round's steps."""

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """BYOL's, and the distance before the step."""
        out = BYOL.loss(self, model, batch, step)
        with torch.no_grad():
            squares = [(a - b).square().sum() for a, b in _weights(model)]
            return replace(out, aux={**out.aux, "lag": torch.stack(squares).sum().sqrt()})


@dataclass(frozen=True)
class _Recorded(SSLMethod):
    """A method that remembers some weights of student and teacher after every step."""

    method: SSLMethod
    kept: Tensor  # (K,) positions in all weights
    students: list[Tensor] = field(default_factory=list)
    teachers: list[Tensor] = field(default_factory=list)

    @property
    def views(self) -> int:
        """Those of the method."""
        return self.method.views

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the method."""
        return self.method.parts

    @property
    def coupling(self) -> Coupling:
        """As the method."""
        return self.method.coupling

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """The method's model."""
        return self.method.init(encoder, sizes)

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The method's loss."""
        return self.method.loss(model, batch, step)

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """The method's, then remember."""
        self.method.after_step(model, out, step)
        self.remember(model)

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """The method's, then remember the start."""
        self.method.after_merge(model, own, public, augment, step)
        self.remember(model)

    def remember(self, model: Model) -> None:
        """Copy the kept weights."""
        for place, which in ((self.teachers, 0), (self.students, 1)):
            place.append(torch.cat([pair[which].detach().flatten() for pair in _weights(model)])[self.kept])


@dataclass(frozen=True)
class Path:
    """Students and teachers of one training, from the start on."""

    decay: float
    students: Array  # (1 + t, K)
    teachers: Array  # (1 + t, K)

    @classmethod
    def of(cls, decay: float, epochs: int, seed: int) -> Path:
        """Train BYOL on all digits at a constant learning rate, with a teacher of constant decay."""
        options = (f"method.decay={decay}", "method.decay_schedule=constant", "local.schedule=constant",
                   "local.warmup=0", f"local.epochs={epochs}", f"seed={seed}")  # fmt: skip
        job = config.compose(["data=digits", "method=byol", *QUICK, *CENTRAL, *options]).job
        train = data_of(job, CPU).train
        model = build_model(job, train.shape)
        derive(model, job.method.parts, ["teacher."])
        total = sum(student.numel() for _, student in _weights(model))
        kept = seeds.stream(0, "study", "teacher", "weights").choice(total, min(_KEPT, total), replace=False)
        method = _Recorded(job.method, torch.from_numpy(np.sort(kept)))
        everything = train.shard(np.arange(len(train)), 0)
        fit(method, model, everything, job.data.augment, job.local, gradient=PlainGradient(), round=1, rounds=1,
            seed=seed, client=0)  # fmt: skip
        students, teachers = (torch.stack(each).double().numpy() for each in (method.students, method.teachers))
        return cls(decay, students, teachers)

    @property
    def steps(self) -> int:
        """t."""
        return len(self.students) - 1

    def error(self) -> float:
        """Of the closed form at the end: its distance from the recorded teacher over the way the teacher went."""
        expected = ema_teacher(self.students[1:], self.students[0], self.decay)
        way = np.linalg.norm(self.teachers[-1] - self.teachers[0])
        return float(np.linalg.norm(self.teachers[-1] - expected) / way)

    def age(self) -> float:
        """How many steps ago the student lay nearest to the teacher; mean over the last quarter."""
        return float(np.mean([self._age(t) for t in self._last]))

    def expected_age(self) -> float:
        """The closed form's mean age of the weights in the teacher, over the same steps."""
        return float(np.mean([ema_lag(self.decay, t) for t in self._last]))

    def lag(self) -> float:
        """The teacher's distance from the student in lengths of a step; mean over the last quarter."""
        moves = np.linalg.norm(np.diff(self.students, axis=0), axis=1)
        found = [np.linalg.norm(self.teachers[t] - self.students[t]) / moves[:t][-100:].mean() for t in self._last]
        return float(np.mean(found))

    def expected_lag(self) -> float:
        """The same if steps were independent: the root of the sum of m^(2k) over k from 1 to t."""
        m = self.decay
        return float(np.mean([np.sqrt(np.sum(m ** (2.0 * np.arange(1, t + 1)))) for t in self._last]))

    @property
    def _last(self) -> range:
        return range(self.steps - self.steps // 4, self.steps + 1, 5)

    def _age(self, t: int) -> int:
        distance = np.linalg.norm(self.students[: t + 1] - self.teachers[t], axis=1)
        return int(t - np.argmin(distance))
