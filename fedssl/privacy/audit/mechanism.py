"""Audits of the code that trains: canaries whose gradients are chosen, and the noisy sums that come out.

A mechanism is anything that turns the gradients of the records of one step and a stream of noise into a noisy sum. The
strongest canary needs no model: its gradient points along an axis of its own (a Dirac canary), and its score is what
came out along that axis. `through` puts such records through a gradient transform exactly as `fit` would, by a method
whose gradient is the example itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.method import Batch, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.parts import Coupling, Part
from fedssl.privacy.audit.bounds import guess_bound, split_bound

Floats = NDArray[np.float64]
Mechanism = Callable[[Tensor, np.random.Generator], Tensor]  # (n, D) gradients of the records -> (D,) noisy sum
Release = Callable[[bool, np.random.Generator], Tensor]  # is the record there -> what comes out, of any shape


@dataclass(frozen=True)
class Scores:
    """Scores of independent runs: larger says that the record was there."""

    present: Floats  # (R,) runs with the record
    absent: Floats  # (R,) runs without it

    def epsilon(self, *, delta: float, confidence: float = 0.95, bound: Callable[..., float] | None = None) -> float:
        """The lower bound of `split_bound`; `bound=gdp_lower_bound` assumes GDP."""
        chosen = {} if bound is None else {"bound": bound}
        return split_bound(self.present, self.absent, delta=delta, confidence=confidence, **chosen)


def repeated_runs(release: Release, direction: Tensor, *, runs: int, seed: int) -> Scores:
    """Runs both worlds again and again, each time with noise of its own, and scores what comes out along a direction.

    Args:
        release: the mechanism with one record present or absent, all else fixed.
        direction: of the shape of what it releases; against Gaussian noise the best is how far the record moves the
            release without noise.
        runs: of each world, at least 2.
        seed: names the streams of noise.
    """
    drawn = {
        world: [float((release(world, seeds.stream(seed, "audit", world, i)) * direction).sum()) for i in range(runs)]
        for world in (True, False)
    }
    return Scores(np.array(drawn[True]), np.array(drawn[False]))


def dirac(count: int, dim: int, length: float) -> Tensor:
    """(count, dim) float64 gradients, each along an axis of its own; choose a length above the clipping norm.

    Raises:
        ConfigError: more canaries than axes.
    """
    if not 1 <= count <= dim:
        raise ConfigError(f"{count} canaries have no axis each in {dim} dimensions: give 1 <= canaries <= dimensions")
    return length * torch.eye(count, dim, dtype=torch.float64)


def one_run(
    mechanism: Mechanism,
    *,
    canaries: int,
    length: float,
    seed: int,
    delta: float = 0.0,
    confidence: float = 0.95,
    steps: int = 1,
    repeats: int = 1,
    company: Tensor | None = None,
) -> float:
    """A lower bound of epsilon from one run with many Dirac canaries, each there by a fair coin of its own.

    A canary that is absent leaves a record with a gradient of zero in its place: how many records there are is public.

    Args:
        mechanism: called once a step with the gradients of all records that are there; sampling is its own affair.
        canaries: m; 1000 catch a factor of three in epsilon, 30 a mechanism without noise.
        length: of their gradients.
        seed: of the coins and the noise.
        delta, confidence: see `bounds.one_run_lower_bound`.
        steps: whose sums are added up before they are scored.
        repeats: independent runs, which count as one with so many times m canaries: each coin reaches one of them only.
        company: (n, D) gradients of records that are always there, D at least m; none by default, with D = m.
    """
    dim = canaries if company is None else company.shape[1]
    records = dirac(canaries, dim, length)
    scores, coins = [], []
    for run in range(repeats):
        included = seeds.stream(seed, "audit", "coins", run).random(canaries) < 0.5
        there = records * torch.from_numpy(included)[:, None]
        there = there if company is None else torch.cat((there, company.to(there)))
        noise = seeds.stream(seed, "audit", "noise", run)
        total = torch.zeros(dim, dtype=torch.float64)
        for _ in range(steps):
            total += mechanism(there, noise).double()
        scores.append(total[:canaries].numpy())
        coins.append(included)
    return guess_bound(np.concatenate(scores), np.concatenate(coins), delta=delta, confidence=confidence)


@dataclass(frozen=True)
class GivenGradient(SSLMethod):
    """A method without a purpose: the gradient of an example's loss is the example, whatever the model.

    Its loss is the inner product with the only parameter, so every transform of gradients, its sampling, clipping and
    noise, can be fed any gradients.
    """

    views: ClassVar[int] = 1
    parts: ClassVar[tuple[Part, ...]] = (Part("encoder"),)
    coupling: ClassVar[Coupling] = Coupling.none

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """A parameter of the examples' size; the encoder given is not used."""
        return nn.ModuleDict({"encoder": _Inner(int(sizes.shape[0]))})

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean of the inner products."""
        features = model["encoder"](batch.views[0])  # (B, 1)
        each = features[:, 0]
        return LossOutput(each.mean(), each, features, {})


class _Inner(nn.Module):
    """(B, D) -> (B, 1), the inner product with a weight that starts at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight)[:, None]


class Trains(Protocol):
    """The part of a gradient transform that touches records; see `fedssl.gradient.GradientTransform`."""

    def batches(self, n: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[Tensor]: ...
    def backward(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, rng: np.random.Generator
    ) -> LossOutput: ...


def through(transform: Trains, *, batch_size: int, epochs: int = 1, limit: int | None = None) -> Mechanism:
    """The mechanism of a gradient transform: its batches of these records and its gradients, added up over the steps.

    What `fit` would hand to the optimiser comes out; a factor, such as one over the expected size of a batch, does not
    change what canaries show. Nothing is asked of `admit`: an audit measures what the code does.

    Args:
        transform: the one that trains a client with as many records.
        batch_size, epochs: as in local training.
        limit: of the steps; all by default.
    """

    def mechanism(gradients: Tensor, rng: np.random.Generator) -> Tensor:
        method: SSLMethod = GivenGradient()  # type: ignore[abstract]  # what it leaves empty is optional
        model = method.init(nn.Identity(), Sizes(1, len(gradients), tuple(gradients.shape[1:]))).train()
        batches = list(transform.batches(len(gradients), batch_size, epochs, rng))
        total = torch.zeros(gradients.shape[1], dtype=torch.float64)
        for i, index in enumerate(batches[:limit]):
            model.zero_grad(set_to_none=True)
            views = [gradients.double()[index]] if len(index) else []
            transform.backward(method, model, Batch(views, index), Step(1, 1, i, len(batches)), rng)
            for parameter in model.parameters():
                total += torch.zeros_like(total) if parameter.grad is None else parameter.grad
        return total

    return mechanism
