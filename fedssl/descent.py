"""What moves the weights in local training: SGD with momentum or AdamW, and the pull of a proximal term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

if TYPE_CHECKING:
    from fedssl.client import Local

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW; torch's own


class Descent:
    """A fresh optimiser of a model's trained parameters; norms and biases take no weight decay.

    It takes the steps of `torch.optim.SGD` and of the fused `torch.optim.AdamW`, bit for bit, by the functions that
    these call. The classes themselves import torch's compiler when the first one is made: 800 modules, and more than a
    second before the first step of every process.
    """

    def __init__(self, model: nn.Module, local: Local) -> None:
        self._local = local
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._momenta: dict[nn.Parameter, Tensor | None] = {}
        self._moments: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}  # first, second, steps taken

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters that have a gradient, with this learning rate."""
        for decays in (True, False):
            chosen = [p for p in self.parameters if (p.dim() > 1) is decays and p.grad is not None]
            if chosen:
                move = self._sgd if self._local.optimizer == "sgd" else self._adamw
                move(chosen, rate, self._local.weight_decay if decays else 0.0)

    def _sgd(self, chosen: list[nn.Parameter], rate: float, decay: float) -> None:
        momenta = [self._momenta.get(p) for p in chosen]
        sgd(
            list[Tensor](chosen), [p.grad for p in chosen if p.grad is not None], momenta, weight_decay=decay,
            momentum=self._local.momentum, lr=rate, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        self._momenta.update(zip(chosen, momenta, strict=True))  # the first step has made them

    def _adamw(self, chosen: list[nn.Parameter], rate: float, decay: float) -> None:
        for p in chosen:
            if p not in self._moments:
                zeros = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
                self._moments[p] = (*zeros, torch.zeros((), device=p.device))  # type: ignore[assignment]
        first, second, taken = (list(each) for each in zip(*(self._moments[p] for p in chosen), strict=True))
        adamw(
            list[Tensor](chosen), [p.grad for p in chosen if p.grad is not None], first, second, [], taken, fused=True,
            amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=decay, eps=EPS, maximize=False,
        )  # fmt: skip


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
