"""Two worlds for mechanisms in which records meet: with one record and without it, and all else as bad as can be.

Where records are clipped in groups, in pairs, or act through a statistic as well, a gradient of each record's own says
too little. So one record is put beside those among which it moves the release most, and both worlds go through the
`backward` that trains, again and again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedssl import seeds
from fedssl.losses.decomposed import Own
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part
from fedssl.privacy.audit.mechanism import GivenGradient, Release
from fedssl.privacy.coupled.group_dp import GroupDP, Scheme
from fedssl.privacy.coupled.pair_dp import PairDP
from fedssl.privacy.coupled.statistics_dp import StatisticsDP
from fedssl.privacy.record_dp import Planned

_LONG = 1e6  # clip norms, the length of what is to be clipped
_COMPANY = 15  # records beside that of a pair, in expectation
_STATISTIC = "statistic"  # in what a loss returns


@dataclass(frozen=True)
class Worlds:
    """What goes through a transform.

    Attributes:
        transform: that trains a client.
        method: whose loss the records are made for.
        model: of that method, with one parameter.
        present: views (n, ...) of all records, or none at all.
        absent: those without the record.
        parts: of a release, 1, or 2 with a statistic beside the gradient.
    """

    transform: Planned
    method: SSLMethod
    model: Model
    present: Sequence[Tensor]
    absent: Sequence[Tensor]
    parts: int = 1

    @property
    def moved(self) -> Tensor:
        """How far the record moves what a step of all records releases, without noise."""
        quiet = replace(self.transform, noise_multiplier=0.0, memory={})
        rng = np.random.default_rng(0)  # of noise that is multiplied by zero, and of labels
        return self._step(quiet, True, None, rng) - self._step(quiet, False, None, rng)

    def direction(self, release: Release, *, pilots: int = 50, seed: int = 0) -> Tensor:
        """Where to look: how far the record moves each part, over the variance that a few runs show.

        Args:
            release: see `release`.
            pilots: runs without the record, whose noise no other run has.
            seed: of them.
        """
        seen = torch.stack([release(False, seeds.stream(seed, "audit", "pilot", i)) for i in range(pilots)])
        return self.moved / seen.var(dim=0).clamp(min=1e-300)

    def release(self, *, batch_size: int, epochs: int, rounds: Sequence[int | None]) -> Release:
        """All that a client releases in these rounds, added up.

        Args:
            batch_size, epochs: of local training.
            rounds: the steps of each; None: all.
        """

        def released(there: bool, rng: np.random.Generator) -> Tensor:
            total = torch.zeros(self.parts, dtype=torch.float64)
            for limit in rounds:
                fresh = replace(self.transform, memory={})  # as each round has its own
                records = len((self.present if there else self.absent)[0])
                for index in list(fresh.batches(records, batch_size, epochs, rng))[:limit]:
                    total += self._step(fresh, there, index, rng)
            return total

        return released

    def _step(self, transform: Planned, there: bool, index: Tensor | None, rng: np.random.Generator) -> Tensor:
        """What a step releases: of some records, or of all."""
        views = self.present if there else self.absent
        index = torch.arange(len(views[0])) if index is None else index
        self.model.zero_grad(set_to_none=True)
        batch = Batch([view[index] for view in views], index)
        out = transform.backward(self.method, self.model, batch, Step(1, 1, 0, 1), rng)
        parts = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        if _STATISTIC in out.aux:
            parts.append(out.aux[_STATISTIC])
        return torch.cat(parts).double()


def worlds(transform: Planned, method: SSLMethod) -> Worlds | None:
    """The worlds for a mechanism; None for one that `one_run` audits with a gradient of each record's own.

    Args:
        transform: that trains a client.
        method: that the client trains; pairs have bounds for some losses only, so theirs is the real one.
    """
    mechanism = transform.mechanism
    if isinstance(mechanism, StatisticsDP):
        return _of_statistics(transform, mechanism)
    if isinstance(mechanism, GroupDP):
        return _of_slots(transform, mechanism) if mechanism.scheme == Scheme.slots else _of_labels(transform, mechanism)
    return _of_pairs(transform, method) if isinstance(mechanism, PairDP) else None


def _of_statistics(transform: Planned, mechanism: StatisticsDP) -> Worlds:
    """One record, with a statistic and a gradient that are both clipped; without it, nobody."""
    record = _LONG * torch.tensor([[mechanism.clip_norm, mechanism.statistic_norm]], dtype=torch.float64)
    method: SSLMethod = _Stated()  # type: ignore[abstract]  # what it leaves empty is optional
    return Worlds(transform, method, _Stated.model(), [record], [record[:0]], parts=2)


def _of_slots(transform: Planned, mechanism: GroupDP) -> Worlds:
    """One group whose records all pull the same way; a group with an empty slot contributes nothing, so zeros."""
    group = torch.full((mechanism.size, 1), _LONG * mechanism.clip_norm, dtype=torch.float64)
    return Worlds(transform, *_inner(), [group], [torch.zeros_like(group)])


def _of_labels(transform: Planned, mechanism: GroupDP) -> Worlds:
    """A record that outweighs all others, which pull the other way: its group's gradient turns round."""
    bins = max(1, round(transform.divisor / mechanism.size))
    beside = max(1, min(transform.n - 1, math.ceil(4 * bins / transform.sample_rate)))
    others = torch.full((beside, 1), -_LONG * mechanism.clip_norm, dtype=torch.float64)
    return Worlds(transform, *_inner(), [torch.cat((others, -(beside + 1) * others[:1]))], [others])


def _of_pairs(transform: Planned, method: SSLMethod) -> Worlds:
    """Unit vectors in the plane, close together, that turn with the parameter, each far faster than the one before.

    The gradient of each pair's cosine then has the sign of its two angles' order and is clipped. The record is at the
    end of the angles and turns fastest: its pairs point one way, those of all others the other way, and the weights
    that it takes from them turn the sum.
    """
    beside = max(1, min(transform.n - 1, math.ceil(_COMPANY / transform.sample_rate)))
    ratio = min(5.0, 10 ** (60 / (2 * beside + 6)))  # of one's speed to the next one's
    angle = torch.linspace(0.02, 0.1, 2 * beside, dtype=torch.float64)
    speed = 1e3 * ratio ** torch.arange(2 * beside, dtype=torch.float64)
    record = torch.tensor([0.0, -1e-3], dtype=torch.float64)
    fastest = 1e3 * ratio ** torch.tensor([2.0 * beside + 4, 2.0 * beside + 2], dtype=torch.float64)
    first, second = (_turning(angle[i::2], speed[i::2]) for i in (0, 1))
    own = _turning(record, fastest)
    present = [torch.cat((first, own[:1])), torch.cat((second, own[1:]))]
    model = nn.ModuleDict({"encoder": _Moving(), "projector": nn.Identity()})
    return Worlds(transform, method, model.train(), present, [first, second])


def _inner() -> tuple[SSLMethod, Model]:
    method: SSLMethod = GivenGradient()  # type: ignore[abstract]  # what it leaves empty is optional
    return method, method.init(nn.Identity(), Sizes(1, 1, (1,))).train()


def _turning(angle: Tensor, speed: Tensor) -> Tensor:
    """(n, 4) unit vectors and how they move with the parameter."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -speed * sin, speed * cos], 1)


class _Moving(nn.Module):
    """(B, 2 K) -> (B, K): a place, and a direction in which the only parameter, 0 at first, moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        place, way = x.chunk(2, dim=1)
        moved: Tensor = place + self.weight * way
        return moved


@dataclass(frozen=True)
class _Stated(SSLMethod):
    """A method without a purpose: an example's first number is its gradient, the second its statistic."""

    views: ClassVar[int] = 1
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"),)
    coupling: ClassVar[Coupling] = Coupling.batch
    length: ClassVar[int] = 1
    matrix: ClassVar[int] = 0
    undecomposed: ClassVar[str] = ""

    @staticmethod
    def model() -> Model:
        """One parameter."""
        return nn.ModuleDict({"encoder": nn.Linear(1, 1, bias=False, dtype=torch.float64)}).train()

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """The same, whatever is given."""
        return self.model()

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The mean of the records' own losses; F is 0."""
        own = self.own(model, batch, step, len(batch.index))
        return LossOutput(own.losses.mean(), None, own.features, {})

    def own(self, model: Model, batch: Batch, step: Step, n: int) -> Own:
        """The first number times the parameter, and the second number."""
        gradient, statistic = batch.views[0].split(1, dim=1)
        features = model["encoder"](gradient)
        return Own(features[:, 0], statistic, features)

    def coupled(self, s: Tensor, n: int) -> Tensor:
        """Nothing: what a released statistic leads to afterwards costs nothing."""
        return 0 * s.sum()

    def settled(self, s: Tensor) -> Tensor:
        """As it is."""
        return s

    def told(self, s: Tensor) -> Mapping[str, Tensor]:
        """The statistic as it was released."""
        return {_STATISTIC: s}
