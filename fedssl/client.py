"""fit(): the only training loop of the project."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedssl import schedules, seeds
from fedssl.cohort import seats
from fedssl.descent import Descent, Pull
from fedssl.diagnostics import feature_std
from fedssl.edge.allowance import Allowance
from fedssl.errors import ConfigError, TrainingError
from fedssl.gradient import GradientTransform
from fedssl.measures.movement import Movement
from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step, View, views_of
from fedssl.model import Model, derive, parameters
from fedssl.networks.acceleration import accelerate
from fedssl.networks.norms import commit_statistics, discard_statistics
from fedssl.networks.recompute import recomputing


@dataclass(frozen=True)
class Local:
    """Local training, the same for every client; the learning-rate schedule spans the whole run."""

    epochs: int = 1
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 0.002
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-4  # of matrices and kernels only
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the run
    clip_norm: float | None = None
    decorrelation: float = 0.0  # weight of FedDecorr's term, added to any method's loss
    precision: str = "float32"
    channels_last: bool = False  # see `acceleration`
    compiled: bool = False
    checkpointing: bool = False  # of the encoder's activations: less memory, one more forward pass, the same bits

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise ConfigError(
                f"local.epochs={self.epochs} and local.batch_size={self.batch_size} must both be at least 1"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"local.lr={self.lr} is not a learning rate: give a positive number")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"local.warmup={self.warmup} is a share of the run: give a number in [0, 1)")
        if self.decorrelation < 0:
            raise ConfigError(f"local.decorrelation={self.decorrelation} rewards correlation: give 0 or more")
        for name, value, allowed in (
            ("optimizer", self.optimizer, ("sgd", "adamw")),
            ("schedule", self.schedule, ("cosine", "constant")),
            ("precision", self.precision, ("float32", "bf16")),
        ):
            if value not in allowed:
                raise ConfigError(f"local.{name}={value} is unknown: use {' or '.join(allowed)}")


@dataclass(frozen=True)
class FitResult:
    """What one round of local training reports."""

    examples: int
    steps: int
    loss: float  # mean over the round, weighted by examples; nan without a step
    feature_std: float  # of the last batch with examples; 0 without one; see diagnostics.feature_std
    measures: Mapping[str, float] = field(default_factory=dict)  # the method's, means over the round
    movement: Mapping[str, float] = field(default_factory=dict)  # of the weights: see `Movement`
    work: float = 1.0  # share of the round's steps that was done


@dataclass(frozen=True)
class Gauges:
    """What is measured of a client's steps besides their loss; see `FitResult`."""

    feature_std: float
    movement: Mapping[str, float]


class Training:
    """One client's round of local training: what surrounds the steps, and each step.

    `fit` takes the steps one by one; a cohort takes those of several clients at once.

    Attributes:
        done: how many steps the client has time for, of `steps`.
        totals: sums over examples of the loss and of what the method reports, by name.
        joint: measures the steps when they have been taken, where a cohort does that for all of its clients at once.
    """

    def __init__(
        self,
        method: SSLMethod,
        model: Model,
        data: Examples,
        augment: Augment,
        local: Local,
        *,
        gradient: GradientTransform,
        round: int,
        rounds: int,
        seed: int,
        client: int,
        public: Examples | None = None,
        pull: Pull | None = None,
        work: float = 1.0,
        attempt: int = 1,
        allowance: Allowance | None = None,
    ) -> None:
        if len(data) == 0:
            raise ConfigError(
                f"client {client} has no examples: use fewer federation.clients or a larger partition.min_size"
            )
        self.method, self.model, self.data, self.augment, self.local = method, model, data, augment, local
        self.gradient, self.public, self.pull, self.allowance = gradient, public, pull, allowance
        self.round, self.rounds, self.seed, self.client = round, rounds, seed, client
        self.device = device = next(model.parameters()).device
        path = self._path = ("client", client, "round", round)
        self._again = ("attempt", attempt) if attempt > 1 and gradient.private else ()
        order = seeds.stream(seed, *path, *self._again, "order")
        self.generator = seeds.torch_stream(seed, *path, "augment", device=device)
        drawn = gradient.batches(len(data), local.batch_size, local.epochs, order)
        self.batches = [index.to(device) for index in drawn]
        self.steps = len(self.batches)
        self.done = math.floor(work * self.steps + 1e-9)  # 0.7 * 10 is 7, in spite of its last bit
        self.totals: dict[str, Tensor] = {"loss": torch.zeros((), device=device)}
        self.seen = 0
        self.features: Tensor | None = None
        self._movement: Movement | None = None
        self.joint: Callable[[], Gauges] | None = None

    @cached_property
    def noise(self) -> np.random.Generator:
        """What a private gradient draws from."""
        return seeds.stream(self.seed, *self._path, *self._again, "gradient")

    @cached_property
    def public_rows(self) -> Sequence[Tensor | None]:
        """The public examples beside each batch, on the device before the first step: a copy waits for it."""
        if self.public is None or not self.method.reads_public:
            return [None] * self.steps
        rng = seeds.stream(self.seed, *self._path, "public")
        return [public_rows(self.method, self.public, rng, self.device) for _ in range(self.steps)]

    def begin(self) -> None:
        """Bring the model into the state of a first step."""
        if not all(module.training for module in self.model.modules()):  # to set it again takes longer
            self.model.train()
        _ = self.public_rows
        accelerate(self.model, channels_last=self.local.channels_last, compiled=self.local.compiled)
        discard_statistics(self.model)
        parts = self.method.parts
        derive(self.model, parts, [f"{part.name}." for part in parts if part.frozen])
        self.method.after_merge(self.model, self.data, self.public, self.augment, self.at(0))

    def watch(self) -> None:
        """Measure, from now on, how far the steps move the parts of this client's model."""
        self._movement, self.joint = Movement(parameters(self.model), self.method.parts), None

    def at(self, i: int) -> Step:
        """Where step `i` stands in the run."""
        return Step(self.round, self.rounds, i, self.steps)

    def rate(self, i: int) -> float:
        """The learning rate of step `i`."""
        local = self.local
        return schedules.learning_rate(self.at(i).progress, local.lr, local.schedule, local.warmup)

    def batch(self, i: int) -> Batch:
        """Draw the batch of step `i`: to be called once for each, in order."""
        index = self.batches[i]
        views = views_of(self.method, self.augment, self.data.batch(index), self.generator) if len(index) else []
        return self.beside(views, i)

    def beside(self, views: Sequence[View], i: int) -> Batch:
        """The batch of step `i` with these views of its examples."""
        return beside(Batch(views, self.batches[i]), self.public, self.augment, self.public_rows[i])

    def run(self, first: Batch | None = None) -> None:
        """Take all steps, or those that there is time for; the first with its batch if it has been drawn.

        Nothing waits for the device, unless somebody counts its seconds.
        """
        self.watch()
        descent = Descent(self.model, self.local)
        if self.allowance is not None:
            self.allowance.begin()
        for i in range(self.done):
            if i and self.allowance is not None and not self._another(self.allowance):
                self.done = i
                break
            self.step(i, self.batch(i) if i or first is None else first, descent)

    def _another(self, allowance: Allowance) -> bool:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return allowance.another()

    def step(self, i: int, batch: Batch, descent: Descent) -> None:
        """Take step `i`."""
        descent.zero_grad()
        half = precision(self.device, self.local)
        again = recomputing(self.model["encoder"]) if self.local.checkpointing else nullcontext()
        with half, again:
            out = self.gradient.backward(self.method, self.model, batch, self.at(i), self.noise)
        if self.pull is not None:
            self.pull.apply()
        if self.local.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(descent.parameters, self.local.clip_norm)
        descent.step(self.rate(i))
        commit_statistics(self.model)
        for name, value in scalars(out).items():
            self.totals[name] = self.totals.get(name, 0) + value * len(batch.index)
        self.stepped(i, out)

    def stepped(self, i: int, out: LossOutput) -> None:
        """After the optimiser's step `i`: what follows the weights, follows them now."""
        if i == self.steps - 1 and self._movement is not None:
            self._movement.before_following()
        self.method.after_step(self.model, out, self.at(i))
        self.seen += len(self.batches[i])
        if len(out.features):  # a Poisson sample may be empty
            self.features = out.features.detach()

    def result(self) -> FitResult:
        """What the round reports; the method's summaries of the client's data are made here.

        Raises:
            TrainingError: the loss is not a finite number.
        """
        measures = {name: value.item() / max(1, self.seen) for name, value in self.totals.items()}
        loss = measures.pop("loss")
        # Private gradients are finite whatever a record's loss is.
        if not math.isfinite(loss) and not self.gradient.private:
            raise TrainingError(
                f"the loss of client {self.client} became {loss} in round {self.round}: training cannot go on from "
                f"there; lower local.lr (now {self.local.lr}) or set local.clip_norm=1"
            )
        gauges = self.gauges()
        generator = seeds.torch_stream(self.seed, *self._path, "upload", device=self.device)
        said = self.method.before_upload(self.model, self.data, self.public, self.augment, generator)
        measures |= {name: value.item() for name, value in said.items()}
        share = self.done / self.steps
        return FitResult(len(self.data), self.done, loss, gauges.feature_std, measures, gauges.movement, share)

    def gauges(self) -> Gauges:
        """What is measured of the steps that were taken; the device is waited for."""
        if self.joint is not None:
            return self.joint()
        std = feature_std(self.features.float()) if self.features is not None else 0.0
        return Gauges(std, self._movement.measures()[0] if self._movement is not None else {})


def fit(
    method: SSLMethod,
    model: Model,
    data: Examples,
    augment: Augment,
    local: Local,
    *,
    gradient: GradientTransform,
    round: int,
    rounds: int,
    seed: int,
    client: int,
    public: Examples | None = None,
    pull: Pull | None = None,
    work: float = 1.0,
    attempt: int = 1,
    allowance: Allowance | None = None,
) -> FitResult:
    """Train a model in place on one client's examples for one round.

    All randomness comes from (seed, client, round), so the result does not depend on who trained before. Nothing
    inside the loop waits for the device. In a thread that has a seat in a cohort, the steps are taken together with
    the clients of the other seats.

    With `work` below 1 the client stops early: it does that share of the round's steps, rounded down, exactly as it
    would have begun the whole round, learning rates included. Without time for a step it changes nothing. With an
    `allowance` it stops likewise when the clock says so, after one step at least; then the result depends on the clock.

    A round with a private gradient that is begun again after a kill has the next `attempt`, so its noise and samples
    are new: noise that was drawn for one sum must not be seen under another.

    Raises:
        ConfigError: the client has no examples, or too few for batch normalisation.
        TrainingError: the loss is not a finite number.
    """
    training = Training(
        method, model, data, augment, local, gradient=gradient, round=round, rounds=rounds, seed=seed, client=client,
        public=public, pull=pull, work=work, attempt=attempt, allowance=allowance,
    )  # fmt: skip
    if not training.done:
        return FitResult(examples=len(data), steps=0, loss=math.nan, feature_std=math.nan, work=0.0)
    training.begin()
    seats.take(training)
    return training.result()


def public_rows(
    method: SSLMethod, public: Examples | None, rng: np.random.Generator, device: torch.device
) -> Tensor | None:
    """(P,) int64: as many public examples as the method's loss reads beside a batch, or all if there are fewer."""
    if public is None or not (method.reads_public and method.public_batch):
        return None
    return torch.from_numpy(rng.permutation(len(public))[: method.public_batch]).to(device)


def precision(device: torch.device, local: Local) -> torch.autocast:
    """Autocast to what `local.precision` says, for one step.

    Torch's cache of weights in half precision is off: whichever thread ends a step empties that of all, so whether a
    weight's gradients were added up in half precision would depend on the others.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=local.precision == "bf16", cache_enabled=False)


def beside(batch: Batch, public: Examples | None, augment: Augment, rows: Tensor | None) -> Batch:
    """The batch with these public examples beside it."""
    if public is None or rows is None:
        return batch
    return replace(batch, public=augment.plain(public.batch(rows)), public_index=rows)


def scalars(out: LossOutput) -> dict[str, Tensor]:
    """What a round reports the means of: the loss, and what the method says besides."""
    return {"loss": out.loss.detach(), **{name: value for name, value in out.aux.items() if value.ndim == 0}}
