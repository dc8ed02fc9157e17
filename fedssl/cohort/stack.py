"""Models of one kind as one: every parameter and buffer with a leading axis for the client."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedssl.client import Local
from fedssl.descent import BETAS, EPS, Pull
from fedssl.model import Model


class Stack:
    """K models whose tensors are rows of shared ones, so what changes one is seen by the other.

    Attributes:
        parameters: by name, (K, *shape) each; those that are trained require a gradient.
        buffers: by name, (K, *shape).
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.size = len(models)
        self._parameters = [dict(model.named_parameters()) for model in models]
        self.parameters = {name: _shared([own[name] for own in self._parameters]) for name in self._parameters[0]}
        for name, parameter in self._parameters[0].items():
            self.parameters[name].requires_grad_(parameter.requires_grad)
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: _shared([own[name] for own in buffers]) for name in buffers[0]}
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        device = next(iter(self.parameters.values())).device
        # Rows are chosen on the device: to send their numbers would wait for it.
        self._numbers = torch.split(torch.arange(self.size, device=device), 1)

    def rows(self, rows: Sequence[int]) -> Rows:
        """Some of the models, or all of them without a copy."""
        return Rows(self, None if len(rows) == self.size else torch.cat([self._numbers[row] for row in rows]))

    def names(self, parameters: Sequence[Tensor]) -> list[str]:
        """The names of some parameters of the first model."""
        found = {id(parameter): name for name, parameter in self._parameters[0].items()}
        return [found[id(parameter)] for parameter in parameters]

    def hand_out(self, gradients: Sequence[tuple[str, Tensor]], rows: Sequence[int]) -> None:
        """Give each model its own gradients."""
        for name, gradient in gradients:
            for row, own in zip(rows, gradient.unbind(), strict=True):
                self._parameters[row][name].grad = own


class Rows:
    """The tensors of some models of a stack for one step; `put_back` writes what changed where it was copied.

    Attributes:
        numbers: (K,) int64, which models; None: all of them.
        parameters, buffers: as those of the stack.
    """

    def __init__(self, stack: Stack, rows: Tensor | None) -> None:
        self._stack, self.numbers = stack, rows
        self.parameters = {name: self.take(value).requires_grad_(value.requires_grad) for name, value in _of(stack)}
        self.buffers = {name: self.take(value) for name, value in stack.buffers.items()}

    def take(self, value: Tensor) -> Tensor:
        """These rows of a tensor of the stack's size."""
        return value if self.numbers is None else value.detach().index_select(0, self.numbers)

    def put(self, there: Tensor, value: Tensor) -> None:
        """Write rows back to where `take` found them."""
        if self.numbers is not None:
            there.detach().index_copy_(0, self.numbers, value.detach())

    def add(self, there: Tensor, value: Tensor) -> None:
        """Add to these rows of a tensor of the stack's size."""
        if self.numbers is None:
            there.add_(value)
        else:
            there.index_add_(0, self.numbers, value)

    def put_back(self) -> None:
        """Write all parameters and buffers back."""
        for name, value in self.parameters.items():
            self.put(self._stack.parameters[name], value)
        for name, value in self.buffers.items():
            self.put(self._stack.buffers[name], value)

    def gradients(self) -> list[tuple[str, Tensor]]:
        """(name, (K, *shape)) of all parameters that have one."""
        found = ((name, self.parameters[name].grad) for name in self._stack.trained)
        return [(name, gradient) for name, gradient in found if gradient is not None]

    def forget(self) -> None:
        """Drop all gradients."""
        for name in self._stack.trained:
            self.parameters[name].grad = None


class Optimizers:
    """The clients' optimisers as one; like `fedssl.descent.Descent`, they decay matrices and kernels only."""

    def __init__(self, stack: Stack, local: Local) -> None:
        self._local = local
        self._moments: dict[str, tuple[Tensor, ...]] = {}
        count = 1 if local.optimizer == "sgd" else 2
        for name in stack.trained:
            self._moments[name] = tuple(torch.zeros_like(stack.parameters[name].detach()) for _ in range(count))

    @torch.no_grad()
    def step(self, rows: Rows, rate: float, taken: int) -> None:
        """Move these clients' parameters; it is their step number `taken`, from 1 on."""
        gradients = rows.gradients()
        for decays in (True, False):
            chosen = [(name, g) for name, g in gradients if (rows.parameters[name].dim() > 2) is decays]
            if chosen:
                self._apply(rows, chosen, rate, taken, self._local.weight_decay if decays else 0.0)

    def _apply(self, rows: Rows, chosen: Sequence[tuple[str, Tensor]], rate: float, taken: int, decay: float) -> None:
        parameters = [rows.parameters[name].detach() for name, _ in chosen]
        gradients = [gradient for _, gradient in chosen]
        moments = [tuple(rows.take(moment) for moment in self._moments[name]) for name, _ in chosen]
        first = [moment[0] for moment in moments]
        if self._local.optimizer == "sgd":
            sgd(
                parameters, gradients, list(first), weight_decay=decay, momentum=self._local.momentum, lr=rate,
                dampening=0.0, nesterov=False, maximize=False,
            )  # fmt: skip
        else:
            counts = [torch.full((), taken - 1.0, device=p.device) for p in parameters]
            adamw(
                parameters, gradients, first, [moment[1] for moment in moments], [], counts, fused=True, amsgrad=False,
                beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=decay, eps=EPS, maximize=False,
            )  # fmt: skip
        for (name, _), taken_moments in zip(chosen, moments, strict=True):
            for there, moment in zip(self._moments[name], taken_moments, strict=True):
                rows.put(there, moment)


class Pulls:
    """The clients' proximal terms as one, towards where their parameters are now."""

    def __init__(self, stack: Stack, pull: Pull) -> None:
        self._strength = pull.strength
        names = stack.names(pull.parameters)
        self._starts = {name: stack.parameters[name].detach().clone() for name in names}

    @torch.no_grad()
    def apply(self, rows: Rows) -> None:
        """Add the terms' gradients to those of these clients."""
        for name, gradient in rows.gradients():
            if name in self._starts:
                gradient.add_(rows.parameters[name] - rows.take(self._starts[name]), alpha=self._strength)


@torch.no_grad()
def clip(gradients: Sequence[tuple[str, Tensor]], limit: float) -> None:
    """Shorten each client's gradient to a norm of at most `limit`, as `torch.nn.utils.clip_grad_norm_` does for one."""
    parts = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for _, gradient in gradients]
    factors = (limit / (torch.linalg.vector_norm(torch.stack(parts), dim=0) + 1e-6)).clamp(max=1.0)
    for _, gradient in gradients:
        gradient.mul_(factors.view(-1, *([1] * (gradient.dim() - 1))))


@torch.no_grad()
def _shared(tensors: Sequence[Tensor]) -> Tensor:
    """Equal shapes as one tensor, of which they become rows."""
    together = torch.stack([tensor.detach() for tensor in tensors])
    for row, tensor in zip(together.unbind(), tensors, strict=True):
        tensor.data = row
    return together


def _of(stack: Stack) -> list[tuple[str, Tensor]]:
    return list(stack.parameters.items())
