"""The steps of several clients at once: one forward and backward pass through a batch of models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedssl.client import Training, precision
from fedssl.cohort.gauges import CohortGauges
from fedssl.cohort.group_norm import side_by_side
from fedssl.cohort.stack import Optimizers, Pulls, Rows, Stack, clip
from fedssl.cohort.views import joint_views
from fedssl.errors import FedsslError
from fedssl.gradient import PlainGradient
from fedssl.method import Batch, LossOutput, SSLMethod, Step
from fedssl.model import Model, tensors
from fedssl.networks.norms import commit_statistics, discard_statistics


def train_together(trainings: Sequence[Training]) -> list[BaseException | None]:
    """Take all steps of these clients' rounds, together where that is possible, else one client after another.

    The result is that of `Training.run` within rounding: each client has its own batches, views, learning rates and
    state, and sums over a batch or a channel may be taken in another order. Clients whose steps differ in the size of
    their batch or in their place in the run form groups of their own in that step.

    Returns:
        What each client's training raised, or None.
    """
    failures: dict[int, BaseException] = {}
    groups: dict[object, list[Training]] = {}
    for one in trainings:
        has_company = len(trainings) > 1 and _stacks(one)
        groups.setdefault(_kind(one) if has_company else id(one), []).append(one)
    for group in groups.values():
        failures |= _alone(group[0]) if len(group) == 1 else _Together(group).run()
    return [failures.get(id(one)) for one in trainings]


def _stacks(training: Training) -> bool:
    """Whether a client's gradient is that of one loss of one batch of tensors, which can be found for many at once."""
    gradient = training.gradient
    plain = isinstance(gradient, PlainGradient) and gradient.micro_batch is None
    # Second passes and compiled networks know nothing of a batch of models, and a clock nothing of a cohort.
    own = training.local.checkpointing or training.local.compiled or training.allowance is not None
    return plain and not own


def _kind(training: Training) -> tuple[object, ...]:
    """What clients must have in common."""
    shapes = tuple((name, value.shape, value.dtype) for name, value in tensors(training.model))
    return training.method, training.local, training.device, training.pull is None, shapes


class _Loss(nn.Module):
    """A method's loss as a module, whose tensors can be replaced by those of any client."""

    def __init__(self, method: SSLMethod, model: Model) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(
        self, views: Sequence[Tensor], index: Tensor, public: Mapping[str, Tensor], step: Step
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        out = self.method.loss(self.model, Batch(views, index, public.get("view"), public.get("index")), step)
        commit_statistics(self.model)  # into the tensors of this call; no later than after the optimiser's step
        own = {} if out.per_example is None else {"per_example": out.per_example}
        return {"loss": out.loss, "features": out.features, **own}, out.aux


class _Together:
    def __init__(self, trainings: Sequence[Training]) -> None:
        self._trainings = trainings
        first = trainings[0]
        self._local, self._method, self._device = first.local, first.method, first.device
        self._follows = type(first.method).after_step is not SSLMethod.after_step
        self._loss = _Loss(first.method, first.model)
        self._stack = Stack([one.model for one in trainings])
        self._optimizers = Optimizers(self._stack, first.local)
        self._pulls = None if first.pull is None else Pulls(self._stack, first.pull)
        self._gauges = CohortGauges(trainings, self._stack)
        self._totals: dict[str, Tensor] = {}
        self._left: set[int] = set()  # clients that were trained alone

    def run(self) -> dict[int, BaseException]:
        """Take all steps; returns what trainings raised, by their id."""
        failures: dict[int, BaseException] = {}
        for i in range(max(one.done for one in self._trainings)):
            for rows in self._groups(i):
                some = [self._trainings[row] for row in rows]
                batches = joint_views(some, i)
                if not self._step(i, rows, batches):
                    self._left.update(rows)
                    for one, batch in zip(some, batches, strict=True):
                        failures |= _alone(one, batch)
        self._gauges.after_steps(self._trainings)
        for row, training in enumerate(self._trainings):
            if row not in self._left:
                training.totals |= {name: total[row] for name, total in self._totals.items()}
        return failures

    def _groups(self, i: int) -> list[list[int]]:
        """The clients that take step `i` with batches of one size from one place in the run."""

        def key(row: int) -> tuple[int, ...]:
            at, size = self._trainings[row].at(i), len(self._trainings[row].batches[i])
            return at.round, at.steps, size

        active = [row for row, one in enumerate(self._trainings) if i < one.done and row not in self._left]
        return [list(rows) for _, rows in groupby(sorted(active, key=key), key=key)]

    def _step(self, i: int, chosen: Sequence[int], batches: Sequence[Batch]) -> bool:
        """Take step `i` of these clients; False, and nothing changed, if their first loss cannot be found together."""
        some = [self._trainings[row] for row in chosen]
        rows = self._stack.rows(chosen)
        rows.forget()
        try:
            losses, aux = self._losses(rows, batches, some[0].at(i))
        except Exception as error:  # one of the client's own is met again where it trains alone
            discard_statistics(self._loss)  # those of layers before the failure, which nobody may commit
            if i:
                raise
            if not isinstance(error, FedsslError) and all(isinstance(view, Tensor) for view in batches[0].views):
                _say(type(self._method).__name__, f"{type(error).__name__}: {error}".splitlines()[0])
            return False
        losses["loss"].sum().backward()  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        if self._pulls is not None:
            self._pulls.apply(rows)
        if self._local.clip_norm is not None:
            clip(rows.gradients(), self._local.clip_norm)
        self._optimizers.step(rows, some[0].rate(i), i + 1)
        rows.put_back()
        self._count(rows, losses["loss"], aux, len(batches[0].index))
        if i == some[0].steps - 1:
            self._gauges.before_following(rows)
        if self._follows:
            self._stack.hand_out(rows.gradients(), chosen)
        for training, out in zip(some, _apart(losses, aux, len(some)), strict=True):
            training.stepped(i, out)
        return True

    def _losses(
        self, rows: Rows, batches: Sequence[Batch], step: Step
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        named = {f"model.{name}": value for name, value in (rows.parameters | rows.buffers).items()}
        views = [torch.stack(view) for view in zip(*(batch.views for batch in batches), strict=True)]
        public = {"view": [b.public for b in batches], "index": [b.public_index for b in batches]}
        joint = {name: torch.stack(cast(list[Tensor], v)) for name, v in public.items() if v[0] is not None}

        def each(
            own: dict[str, Tensor], views: Sequence[Tensor], index: Tensor, public: Mapping[str, Tensor]
        ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
            found: tuple[dict[str, Tensor], Mapping[str, Tensor]]
            found = functional_call(self._loss, own, (views, index, public, step))
            return found

        with precision(self._device, self._local), side_by_side(self._loss):
            losses, aux = vmap(each)(named, views, torch.stack([batch.index for batch in batches]), joint)
        return losses, aux

    def _count(self, rows: Rows, losses: Tensor, aux: Mapping[str, Tensor], size: int) -> None:
        """Add a step to the clients' totals, without waiting for the device."""
        for name, value in {"loss": losses.detach(), **{n: v for n, v in aux.items() if v.dim() == 1}}.items():
            total = self._totals.setdefault(name, torch.zeros(len(self._trainings), device=value.device))
            rows.add(total, value.detach().to(total.dtype) * size)


@cache
def _say(method: str, why: str) -> None:
    """Once in a process."""
    logging.getLogger("fedssl").warning("%s trains clients one by one: its loss cannot be batched (%s)", method, why)


def _alone(training: Training, first: Batch | None = None) -> dict[int, BaseException]:
    """Take all steps of one client, whose first batch may have been drawn."""
    try:
        training.run(first)
    except Exception as error:  # noqa: BLE001  # raised again where this client waits
        return {id(training): error}
    return {}


def _apart(losses: Mapping[str, Tensor], aux: Mapping[str, Tensor], count: int) -> list[LossOutput]:
    """What each client's loss returned."""
    rows = {name: value.detach().unbind() for name, value in losses.items()}
    own = {name: value.detach().unbind() for name, value in aux.items()}
    return [
        LossOutput(
            rows["loss"][k],
            rows["per_example"][k] if "per_example" in rows else None,
            rows["features"][k],
            {name: values[k] for name, values in own.items()},
        )
        for k in range(count)
    ]
