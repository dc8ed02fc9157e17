"""Gradients of records from one ordinary pass over the batch: each layer notes its inputs and its outputs' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedssl.errors import PrivacyError
from fedssl.model import Model
from fedssl.privacy.ghost.layers import Outer, Use, call, gradients, known


class Tape:
    """What a model's layers have noted.

    Attributes:
        token: a leaf behind every noted output; differentiate by it to fill the tape.
        uses: by layer, in the order of the backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.token = torch.zeros((), device=device, requires_grad=True)
        self.uses: dict[nn.Module, list[Use]] = {}


class _Note(torch.autograd.Function):
    """The identity; its backward pass writes on the tape.

    Its second derivative would miss the weights, which are constants here, so there is none.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, token: Tensor, layer: nn.Module, tape: Tape) -> Tensor:
        ctx.mark_dirty(y)  # y itself goes on, and may be written to as if nobody had looked
        ctx.save_for_backward(x)  # with torch's own check that nobody writes to it
        ctx.layer, ctx.tape = layer, tape
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch's own signature is untyped
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.tape.uses.setdefault(ctx.layer, []).append(Use(x, g))
        return g, None, None, None, None


@contextmanager
def noting(model: Model) -> Iterator[Tape]:
    """Within, known layers call with constant weights and note; a weight that is read otherwise has its gradient."""
    tape = Tape(next(model.parameters()).device)
    layers = [layer for layer in model.modules() if known(layer)]
    try:
        for layer in layers:
            layer.forward = partial(_noted, layer, tape)  # type: ignore[method-assign]
        yield tape
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _noted(layer: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    y = call(layer, x)
    if not torch.is_grad_enabled():
        return y
    noted: Tensor = _Note.apply(y, x.to(y.dtype), tape.token, layer, tape)
    return noted


def collected(
    tape: Tape, losses: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[dict[nn.Parameter, Tensor | Outer], list[nn.Parameter]]:
    """The gradients of each record for parameters that only known layers read; and the parameters that others read.

    Args:
        losses: (n,) one of each record, of a pass within `noting`.
        parameters: all that are trained. Each is in exactly one of the results; one that no loss depends on has zeros.

    Raises:
        PrivacyError: a layer saw another number of rows than there are records.
    """
    tape.uses.clear()  # what the loss itself has differentiated
    n = len(losses)
    direct = torch.autograd.grad(losses.sum(), [tape.token, *parameters], allow_unused=True)[1:]
    others = [p for p, g in zip(parameters, direct, strict=True) if g is not None]
    found: dict[nn.Parameter, Tensor | Outer] = {}
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        for layer, uses in tape.uses.items():
            for parameter, own in gradients(layer, [_checked(layer, use, n) for use in uses]).items():
                if parameter in found:  # one parameter of two layers
                    others.append(parameter)
                found[parameter] = own
    for parameter in parameters:
        if parameter not in found:
            found[parameter] = torch.zeros_like(parameter).expand(n, *parameter.shape)
    return {p: g for p, g in found.items() if not any(p is other for other in others)}, others


def _checked(layer: nn.Module, use: Use, n: int) -> Use:
    weight = cast(Tensor, layer.weight)
    least = {nn.Linear: 2, nn.GroupNorm: 2, nn.LayerNorm: 1 + weight.dim()}.get(type(layer), weight.dim())
    if use.x.dim() < least or len(use.x) != n:
        raise PrivacyError(
            f"a {type(layer).__name__} saw an input of shape {tuple(use.x.shape)} in a batch of {n} records, so which "
            "of its rows belong to which record is not known: use privacy.engine=vmap"
        )
    return Use(use.x.to(weight.dtype), use.g.to(weight.dtype))
