"""DP-SGD for losses of batch statistics: the statistic is released first, and leaves a loss of single records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedssl.errors import ConfigError, PrivacyError
from fedssl.losses.decomposed import Decomposed
from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step
from fedssl.methods.common.wrapper import Wrapper
from fedssl.model import Model
from fedssl.parts import Coupling
from fedssl.privacy import contract, coupling
from fedssl.privacy.example_dp import clipped_gradients
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import Engine, check_engine, pieces, singles
from fedssl.privacy.record_dp import Planned, RecordDP

WIDEST = 128  # of matrices of statistics


@dataclass(frozen=True)
class StatisticsDP(RecordDP):
    """Each step releases the batch's mean statistic and then the gradient that it makes a sum over single records.

    For a loss `sum_i l_i + n F(sum_i phi_i / n)` (see `fedssl.losses.decomposed`), with `phi` shortened to length R and
    n the public divisor: release `s = (sum_i phi_i + N(0, (s1 R)^2)) / n`; take lambda, the gradient of F at s; shorten
    each record's gradient of `l_i + <lambda, phi_i>` to C, and release their sum with N(0, (s2 C)^2). Without noise and
    with nothing shortened this is the batch's gradient.

    Both releases see the same sample, and the second is chosen by the first: together they are as private as *one*
    Gaussian of multiplier `(s1^-2 + s2^-2)^(-1/2)`. For a fixed sample adaptive composition says so (Dong et al. 2019,
    https://arxiv.org/abs/1905.02383, corollary 2), hence both are one post-processing of that Gaussian's pair
    (Blackwell), which mixtures over the sample keep. That multiplier is what is accounted, inside one subsampling.

    Attributes:
        engine: how the gradients of records are found; see `Engine`.
        statistic_norm: R. Where K embeddings have deviation 1, statistics have the length of about sqrt(2) K in VICReg
            and K in Barlow Twins; in spectral contrast sqrt(2) * radius, in DINO at most sqrt(prototypes).
        statistic_share: of the precision of both releases (1 / multiplier^2) that the statistic takes, in (0, 1).
        memory: a running mean's share of itself at each step of a round, in [0, 1): the gradient is taken at the mean
            of the statistics that were released so far, which have less noise and are older. 0: each by itself.
    """

    engine: str = "ghost"
    statistic_norm: float = 10.0
    statistic_share: float = 0.2
    memory: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.statistic_norm > 0 and math.isfinite(self.statistic_norm)):
            raise ConfigError(f"privacy.statistic_norm={self.statistic_norm} is no length: give a positive number")
        if not 0 < self.statistic_share < 1:
            raise ConfigError(
                f"privacy.statistic_share={self.statistic_share} leaves the statistic or the gradient no noise that "
                "bounds it: give a number in (0, 1)"
            )
        if not 0 <= self.memory < 1:
            raise ConfigError(f"privacy.memory={self.memory} is a mean's share of itself: give it in [0, 1)")

    @property
    def released(self) -> str:
        """In words."""
        return (
            "the sum of the records' clipped statistics and, given it, the sum of their clipped gradients, both with "
            "Gaussian noise, each step, as one release; all that is sent follows from them"
        )

    def check(self, method: SSLMethod) -> None:
        """Raise a PrivacyError unless the method's loss follows from the mean of a statistic, and from nothing else."""
        check_engine(self.engine, method)
        name = type(method).__name__
        if not isinstance(method, Decomposed):
            raise PrivacyError(
                f"privacy=statistics has no proof for {name}, whose loss follows from no finite statistic of the batch "
                f"that could be released, as a softmax over examples never does: {_instead(method)}"
            )
        why = contract.lingers(method)
        if method.undecomposed or why:
            which = method.undecomposed or f"{why}: {_instead(method)}"
            raise PrivacyError(f"privacy=statistics has no proof for {name}, which {which}")
        if not contract.alone(method):
            raise PrivacyError(
                f"privacy=statistics would spend a share on a statistic that {name}, as configured, does not need, for "
                "its records are alone: use privacy=example"
            )
        if method.matrix > WIDEST:
            raise PrivacyError(
                f"{name} has statistics of {method.matrix} x {method.matrix} numbers, K x K, and their noise has a "
                "spectral norm of up to 2 s R sqrt(K) / batch (s the statistic's noise multiplier, R "
                "privacy.statistic_norm, which must grow with K too), while the eigenvalues that it hides do not grow: "
                f"set method.out={WIDEST} or less"
            )

    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Raise a PrivacyError unless in the live network records are alone once the statistic is given."""
        contract.check_network(model, method)
        split = cast(Decomposed, method)
        generator = torch.Generator().manual_seed(0)
        slope, mean = (torch.randn(split.length, generator=generator, dtype=torch.float64) for _ in range(2))
        inputs = coupling.inputs(examples, augment, method)
        device = inputs[0].index.device
        given = Given(method, slope.to(device), self.statistic_norm, len(inputs[0].index), split.told(mean.to(device)))
        coupling.probe_alone(given, model, inputs)
        coupling.probe_state(given, model, inputs, augment)
        coupling.probe_engine(Engine(self.engine), given, model, inputs[0])

    def noisy_sum(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, planned: Planned, noise: Noise
    ) -> tuple[list[Tensor], LossOutput]:
        """The statistic first, then the gradients that it allows."""
        split, n = cast(Decomposed, method), planned.divisor
        first, second = multipliers(planned.noise_multiplier, self.statistic_share)
        total = statistic_sum(split, model, batch, step, n, self)
        released = (total + noise.like(total, first * self.statistic_norm)) / n
        slope = slope_of(split, remembered(planned.memory, released, self.memory), n)
        sums, out = clipped_gradients(
            self, Engine(self.engine), Given(method, slope, self.statistic_norm, n), model, batch, step
        )
        noisy = [value + noise.like(value, second * self.clip_norm) for value in sums]
        return noisy, replace(out, aux=dict(split.told(split.settled(released))))


@dataclass(frozen=True, eq=False)
class Given(Wrapper):
    """A method once its statistic is released: the loss `l_i + <slope, phi_i>`, in which no record reads another.

    Attributes:
        slope: (P,) float64, the gradient of F at the released statistic.
        bound: the length to which statistics are shortened, here too: what is differentiated is what was released.
        n: the public size of a batch.
        told: what the method's state may follow.
    """

    slope: Tensor
    bound: float
    n: int
    told: Mapping[str, Tensor] = field(default_factory=dict)
    coupling: ClassVar[Coupling] = Coupling.none

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The mean of those."""
        own = cast(Decomposed, self.base).own(model, batch, step, self.n)
        each = own.losses + (shortened(own.statistics, self.bound) * self.slope).sum(1)
        return LossOutput(each.mean(), each, own.features, self.told)


def multipliers(noise_multiplier: float, share: float) -> tuple[float, float]:
    """Those of statistic and gradient, whose `accountant.joint` is the given one: `1 / s1^2 = share / s^2`."""
    return noise_multiplier / math.sqrt(share), noise_multiplier / math.sqrt(1 - share)


def shortened(statistics: Tensor, bound: float) -> Tensor:
    """(B, P) float64 rows of length at most `bound`; one that is not finite counts as none."""
    rows = statistics.double()
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * (bound / lengths.clamp(min=bound))


@torch.no_grad()
def statistic_sum(split: Decomposed, model: Model, batch: Batch, step: Step, n: int, how: StatisticsDP) -> Tensor:
    """(P,) float64, the sum over records of their shortened statistics, each made of its record alone."""
    total = torch.zeros(split.length, dtype=torch.float64, device=batch.index.device)

    def of(views: list[Any], index: Tensor) -> Tensor:
        alone = Batch([view[None] for view in views], index[None], batch.public, batch.public_index)
        return split.own(model, alone, step, n).statistics[0]

    for piece in pieces(batch, how.micro_batch) if len(batch.index) else ():
        if how.engine in (Engine.ghost, Engine.vmap) and all(isinstance(view, Tensor) for view in piece.views):
            rows = vmap(of, randomness="different")(list(piece.views), piece.index)
        else:
            rows = torch.cat([split.own(model, alone, step, n).statistics for alone in singles(piece)])
        total += shortened(rows, how.statistic_norm).sum(0)
    return total


def slope_of(split: Decomposed, released: Tensor, n: int) -> Tensor:
    """(P,) the gradient of F at a released mean statistic, after what makes that sensible; finite."""
    slope: Tensor = grad(lambda s: split.coupled(s, n))(split.settled(released))
    return slope.nan_to_num(0.0, 0.0, 0.0)


def remembered(held: dict[str, Tensor], released: Tensor, memory: float) -> Tensor:
    """The running mean of what was released, and this; `held` goes on. Weights are those of an unbiased start."""
    if memory == 0:
        return released
    mean, weight = held.get("mean", torch.zeros_like(released)), held.get("weight", torch.zeros_like(released[:1]))
    held["mean"] = memory * mean + (1 - memory) * released
    held["weight"] = memory * weight + (1 - memory)
    return held["mean"] / held["weight"]


def _instead(method: SSLMethod) -> str:
    named = contract.changes(method)
    first = f"set {' '.join(named)} with privacy=example, or " if named else ""
    alike = "method=vicreg, barlow_twins, spectral or dino, each with method.norm=group"
    return f"{first}use {alike}, or aggregation=client_dp, under which every method is valid"
