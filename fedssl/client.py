"""fit(): the only training loop of the project."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedssl import schedules, seeds
from fedssl.diagnostics import feature_std
from fedssl.errors import ConfigError, TrainingError
from fedssl.gradient import GradientTransform
from fedssl.method import Augment, Batch, Examples, LossOutput, MultiCrop, SSLMethod, Step, View
from fedssl.model import Model, derive
from fedssl.movement import Movement
from fedssl.norms import commit_statistics, discard_statistics


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
    feature_std: float  # of the last batch's features; see diagnostics.feature_std
    measures: Mapping[str, float] = field(default_factory=dict)  # the method's, means over the round
    movement: Mapping[str, float] = field(default_factory=dict)  # of the weights: see `Movement`
    work: float = 1.0  # share of the round's steps that was done


@dataclass(frozen=True, eq=False)
class Pull:
    """A proximal term: (strength / 2) * |w - w_start|^2 over some parameters, the pull of FedProx."""

    strength: float
    parameters: Sequence[nn.Parameter]
    starts: Sequence[Tensor]

    @classmethod
    def towards_now(cls, strength: float, parameters: Sequence[nn.Parameter]) -> Pull:
        """Towards the present values."""
        return cls(strength, parameters, [p.detach().clone() for p in parameters])

    @torch.no_grad()
    def apply(self) -> None:
        """Add the term's gradient to `p.grad`."""
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.strength)


def optimizer_for(model: nn.Module, local: Local) -> torch.optim.Optimizer:
    """A fresh optimiser; norms and biases take no weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": local.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if local.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=local.lr, momentum=local.momentum)
    return torch.optim.AdamW(groups, lr=local.lr, fused=True)


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
) -> FitResult:
    """Train a model in place on one client's examples for one round.

    All randomness comes from (seed, client, round), so the result does not depend on who trained before. Nothing
    inside the loop waits for the device.

    With `work` below 1 the client stops early: it does that share of the round's steps, rounded down, exactly as it
    would have begun the whole round, learning rates included. Without time for a step it changes nothing.

    A private round that is begun again after a kill has the next `attempt`, so its noise and samples are new: noise
    that was drawn for one sum must not be seen under another.

    Raises:
        ConfigError: the client has no examples, or too few for batch normalisation.
        TrainingError: the loss is not a finite number.
    """
    n = len(data)
    if n == 0:
        raise ConfigError(
            f"client {client} has no examples: use fewer federation.clients or a larger partition.min_size"
        )
    device = next(model.parameters()).device
    path = ("client", client, "round", round)
    again = ("attempt", attempt) if attempt > 1 else ()
    order = seeds.stream(seed, *path, *again, "order")
    noise = seeds.stream(seed, *path, *again, "gradient")
    pixels = seeds.torch_stream(seed, *path, "augment", device=device)
    batches = [index.to(device) for index in gradient.batches(n, local.batch_size, local.epochs, order)]
    steps, done = len(batches), math.floor(work * len(batches) + 1e-9)  # 0.7 * 10 is 7, in spite of its last bit
    if not done:
        return FitResult(examples=n, steps=0, loss=math.nan, feature_std=math.nan, work=0.0)
    optimizer = optimizer_for(model, local)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.train()
    discard_statistics(model)
    derive(model, method.parts, [f"{part.name}." for part in method.parts if part.frozen])
    readings = seeds.stream(seed, *path, "public")
    method.after_merge(model, data, public, augment, Step(round, rounds, 0, steps))
    movement = Movement(model, method.parts)
    totals, seen, features = {"loss": torch.zeros((), device=device)}, 0, None
    for i, index in enumerate(batches[:done]):
        step = Step(round, rounds, i, steps)
        for group in optimizer.param_groups:
            group["lr"] = schedules.learning_rate(step.progress, local.lr, local.schedule, local.warmup)
        views = _views(method, data, index, augment, pixels) if len(index) else []
        optimizer.zero_grad(set_to_none=True)
        batch = beside(Batch(views, index), method, public, augment, readings)
        with torch.autocast(device.type, torch.bfloat16, enabled=local.precision == "bf16"):
            out = gradient.backward(method, model, batch, step, noise)
        if pull is not None:
            pull.apply()
        if local.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trainable, local.clip_norm)
        optimizer.step()
        commit_statistics(model)
        if i == len(batches) - 1:
            movement.before_following()
        method.after_step(model, out, step)
        for name, value in scalars(out).items():
            totals[name] = totals.get(name, 0) + value * len(index)
        seen += len(index)
        features = out.features.detach()
    measures = {name: value.item() / max(1, seen) for name, value in totals.items()}
    loss = measures.pop("loss")
    if not math.isfinite(loss) and not gradient.private:  # private gradients are finite whatever a record's loss is
        raise TrainingError(
            f"the loss of client {client} became {loss} in round {round}: training cannot go on from there; "
            f"lower local.lr (now {local.lr}) or set local.clip_norm=1"
        )
    summaries = seeds.torch_stream(seed, *path, "upload", device=device)
    measures |= {k: v.item() for k, v in method.before_upload(model, data, public, augment, summaries).items()}
    std = feature_std(features.float()) if features is not None else 0.0
    return FitResult(n, done, loss, std, measures, movement.measures(), done / steps)


def _views(
    method: SSLMethod, data: Examples, index: Tensor, augment: Augment, generator: torch.Generator
) -> list[View]:
    """The views of these examples, small crops last."""
    examples = data.batch(index)
    views = [*augment.views(examples, generator, method.views)]
    if method.local_views and isinstance(augment, MultiCrop):
        views += augment.local_views(examples, generator, method.local_views)
    return views


def beside(
    batch: Batch, method: SSLMethod, public: Examples | None, augment: Augment, rng: np.random.Generator
) -> Batch:
    """The batch with as many public examples beside it as the method's loss reads, or all if there are fewer."""
    if public is None or not (method.reads_public and method.public_batch):
        return batch
    rows = torch.from_numpy(rng.permutation(len(public))[: method.public_batch]).to(batch.index.device)
    return replace(batch, public=augment.plain(public.batch(rows)), public_index=rows)


def scalars(out: LossOutput) -> dict[str, Tensor]:
    """What a round reports the means of: the loss, and what the method says besides."""
    return {"loss": out.loss.detach(), **{name: value for name, value in out.aux.items() if value.ndim == 0}}
