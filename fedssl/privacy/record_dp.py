"""Record-level differential privacy: what every mechanism of it shares, from the declared numbers to the noisy step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step
from fedssl.model import Model
from fedssl.privacy import sampling
from fedssl.privacy.accountant import noise_multiplier
from fedssl.privacy.ledger import Entry
from fedssl.privacy.noise import Noise, secure_rng
from fedssl.privacy.per_record import trainable
from fedssl.privacy.statement import Declared


@dataclass(frozen=True)
class RecordDP:
    """Options of every record-level mechanism; a subclass says what is summed up and how far a record moves it.

    Each step draws a Poisson sample of the client's records, sums up what each contributes, adds Gaussian noise of
    `noise_multiplier` times the sum's sensitivity to *every* trainable parameter and divides by a public number, also
    where the sample is empty (Abadi et al. 2016, https://arxiv.org/abs/1607.00133).

    Attributes:
        epsilon: what all planned rounds may cost a client at most; the noise is found for it, and training stops
            before a step would exceed it. Null: noise_multiplier is given and nothing is a budget.
        noise_multiplier: standard deviation of the noise over the sensitivity; null: found from epsilon.
        delta: of every epsilon of the run, in (0, 1): far below 1 / records.
        clip_norm: the length to which contributions are shortened.
        sample_rate: probability of a record in each batch, in (0, 1]. Null: local.batch_size over the client's number
            of records, which then is public, as are the weights by examples. With a number it is public and that
            of records is not: steps, divisor (local.batch_size) and weight do not depend on it.
        micro_batch: records whose gradients are held at once.
        secure: noise and samples from the operating system's generator, not from the run's seed.
    """

    epsilon: float | None = 8.0
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clip_norm: float = 1.0
    sample_rate: float | None = None
    micro_batch: int = 64
    secure: bool = False
    private: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError("privacy.epsilon and privacy.noise_multiplier are both null: give one of them")
        for name, value in (("epsilon", self.epsilon), ("noise_multiplier", self.noise_multiplier)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"privacy.{name}={value} protects nothing: give a positive number, or null")
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ConfigError(f"privacy.clip_norm={self.clip_norm} is no length: give a positive number")
        if not 0 < self.delta < 1:
            raise ConfigError(f"privacy.delta={self.delta} is no probability: give a number far below 1 / records")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise ConfigError(f"privacy.sample_rate={self.sample_rate} is no probability: give it in (0, 1], or null")
        if self.micro_batch < 1:
            raise ConfigError(f"privacy.micro_batch={self.micro_batch} holds no record: give at least 1")

    @property
    def declared(self) -> Declared:
        """What is claimed."""
        known = self.sample_rate is None
        rate = "local.batch_size / records" if known else f"{self.sample_rate:g}"
        return Declared(
            unit="record",
            relation="one record of one client added or removed",
            adversary="the server and all other clients, who see every upload of that client",
            sampler=f"Poisson, each step anew, at the rate {rate}",
            released=self.released,
            delta=self.delta,
            budget=self.epsilon,
            seeded=not self.secure,
            public=("the number of records of each client, which is public: see privacy.sample_rate",) if known else (),
        )

    @property
    @abstractmethod
    def released(self) -> str:
        """What is noised, in words."""

    @abstractmethod
    def check(self, method: SSLMethod) -> None:
        """Refuse a method for which there is no proof, from the configuration alone; see `GradientTransform.admit`."""

    @abstractmethod
    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Refuse a network or a loss that breaks the proof, by looking at the live ones."""

    @abstractmethod
    def noisy_sum(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, planned: Planned, noise: Noise
    ) -> tuple[list[Tensor], LossOutput]:
        """The released sum over the batch's records, for each trainable parameter, and what the loss returned."""

    def planned(self, n: int, batch_size: int, epochs: int, rounds: float) -> Planned:
        """The numbers for one client.

        Args:
            n: its records.
            batch_size, epochs: of local training.
            rounds: in which it will take part, a part of a round for its share.
        """
        rate = sampling.rate(batch_size, n) if self.sample_rate is None else self.sample_rate
        steps = sampling.steps(rate, epochs)
        planned = max(1, math.ceil(rounds * steps)) if self.noise_multiplier is None else 0
        chosen = self.noise_multiplier or noise_multiplier(cast(float, self.epsilon), rate, planned, self.delta)
        divisor = min(batch_size, n) if self.sample_rate is None else batch_size
        return Planned(self, n, rate, steps, chosen, divisor, planned)


@dataclass(frozen=True)
class Planned:
    """A mechanism with the numbers of one client: the `GradientTransform` that trains it.

    Attributes:
        mechanism: says what is summed.
        n: the client's records.
        sample_rate: of each step.
        steps: of a whole round.
        noise_multiplier: of the step as a whole, as it is accounted for.
        divisor: public; the expected number of records in a batch.
        planned_steps: so many fit the budget, because the noise was found for them; 0 if it was not.
        memory: what the mechanism keeps of its own releases from step to step of a round.
    """

    mechanism: RecordDP
    n: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    divisor: int
    planned_steps: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict, compare=False)
    private: ClassVar[bool] = True

    @property
    def weight(self) -> int:
        """The client's weight in a mean: its records if their number is public, else 1."""
        return self.n if self.mechanism.sample_rate is None else 1

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """Poisson samples; their number is public, and empty ones are steps as well."""
        chosen = secure_rng() if self.mechanism.secure else rng
        return sampling.poisson(n, self.sample_rate, self.steps, chosen)

    def backward(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, rng: np.random.Generator
    ) -> LossOutput:
        """Leave the noisy, divided sum in `p.grad` of every trainable parameter."""
        parameters = trainable(model)
        noise = Noise(rng, self.mechanism.secure, parameters[0].device)
        sums, out = self.mechanism.noisy_sum(method, model, batch, step, self, noise)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = (total / self.divisor).to(parameter.dtype)
        return out

    def steps_of(self, work: float) -> int:
        """The steps in a share of a round, as `fit` counts them."""
        return math.floor(work * self.steps + 1e-9)

    def entry(self, at: int, attempt: int, steps: int) -> Entry:
        """What so many steps of a round cost."""
        return Entry(at, attempt, "gradients", self.noise_multiplier, self.sample_rate, steps)


def nothing(model: Model) -> LossOutput:
    """What the loss of an empty sample is: there is none."""
    device = trainable(model)[0].device
    return LossOutput(
        torch.zeros((), device=device), torch.zeros(0, device=device), torch.zeros(0, 1, device=device), {}
    )
