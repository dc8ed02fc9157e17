"""One ordinary pass over a batch in which each layer notes what it sees, and what of it is each record's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedssl.errors import PrivacyError
from fedssl.model import Model
from fedssl.privacy.ghost.layers import Share, call, known, rows, spread
from fedssl.privacy.ghost.outer import Outer


class Tape:
    """What a model's layers have noted.

    Attributes:
        n: records of the batch.
        token: a leaf behind every noted output: who differentiates by it fills the shares.
        shares: by layer.
        copies: of weights of which each record has its own.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.token = torch.zeros((), device=device, requires_grad=True)
        self.shares: dict[nn.Module, Share] = {}
        self.copies: dict[nn.Parameter, Tensor] = {}

    def copy(self, parameter: nn.Parameter) -> Tensor:
        """(n * C,) those of one record after those of another."""
        if parameter not in self.copies:
            self.copies[parameter] = parameter.detach().repeat(self.n).requires_grad_(parameter.requires_grad)
        return self.copies[parameter]


class _Note(torch.autograd.Function):
    """The identity, whose backward pass fills a share."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, token: Tensor, share: Share) -> Tensor:
        ctx.mark_dirty(y)  # y itself goes on, and may be written to as if nobody had looked
        ctx.save_for_backward(x)  # with torch's own check that nobody writes to it
        ctx.share = share
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # the weights are constants here, so second derivatives would miss them
            raise PrivacyError(
                "the loss differentiates a gradient, which the notes of layers cannot follow: use privacy.engine=loop"
            )
        with torch.autocast(g.device.type, enabled=False):
            ctx.share.add(*ctx.saved_tensors, g)
        return g, None, None, None


@contextmanager
def noting(model: Model, n: int) -> Iterator[Tape]:
    """Within, known layers call with constant weights and note; a weight that is read otherwise has its gradient."""
    tape = Tape(n, next(model.parameters()).device)
    layers = [layer for layer in model.modules() if known(layer)]
    try:
        for layer in layers:
            layer.forward = partial(_noted, layer, tape)
        yield tape
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _noted(layer: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, type(layer).forward(layer, x))
    if rows(layer, x) != tape.n:
        raise PrivacyError(
            f"a {type(layer).__name__} saw an input of shape {tuple(x.shape)} in a batch of {tape.n} records, so which "
            "of its rows belong to which record is not known: use privacy.engine=vmap"
        )
    if isinstance(layer, nn.GroupNorm):
        return spread(layer, x, tape.copy(layer.weight), layer.bias if layer.bias is None else tape.copy(layer.bias))
    if layer not in tape.shares:
        tape.shares[layer] = Share(layer)
    y = call(layer, x)
    noted: Tensor = _Note.apply(  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        y, x.to(y.dtype), tape.token, tape.shares[layer]
    )
    return noted


def collected(
    tape: Tape, losses: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[dict[nn.Parameter, Tensor | Outer], list[nn.Parameter]]:
    """The gradients of records for parameters that only noting layers read; and the parameters that others read.

    Args:
        losses: (n,) one of each record, of a pass within `noting`.
        parameters: all that are trained. Each is in exactly one of the results, with zeros if no loss depends on it.
    """
    for share in tape.shares.values():
        share.clear()  # of what the loss itself has differentiated
    copies = {parameter: copy for parameter, copy in tape.copies.items() if parameter.requires_grad}
    inputs = [tape.token, *copies.values(), *parameters]
    _, *direct = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    found: dict[nn.Parameter, Tensor | Outer] = {
        p: g.view(tape.n, -1) for p, g in zip(copies, direct, strict=False) if g is not None
    }
    others = [p for p, g in zip(parameters, direct[len(copies) :], strict=True) if g is not None]
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        for share in tape.shares.values():
            for parameter, own in share.gradients().items():
                if parameter in found:  # one parameter of two layers
                    others.append(parameter)
                found[parameter] = own
    for parameter in parameters:
        if parameter not in found:
            found[parameter] = torch.zeros_like(parameter).expand(tape.n, *parameter.shape)
    return {p: g for p, g in found.items() if not any(p is other for other in others)}, others
