"""What a layer with weights contributes to the gradients of records, from its inputs and its outputs' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.privacy.ghost.outer import Outer

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
_OWN = {"weight", "bias"}


def known(layer: nn.Module) -> bool:
    """Whether the layer is of a kind below and takes its weights as they are, and some of them are trained."""
    if type(layer) not in KINDS or layer._parameters.get("weight") is None or not set(layer._parameters) <= _OWN:
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and (
        layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return False
    return any(p is not None and p.requires_grad for p in layer._parameters.values())


def spread(layer: nn.GroupNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A group normalisation in which each of the n rows of `x` has a weight and a bias of its own, all in (n * C,).

    Groups of different rows are like groups of one row, so all rows are one with n times as many groups: torch then
    finds the gradients of all these weights in the pass that it would have made anyway.
    """
    n = len(x)
    wide = x.reshape(1, n * x.shape[1], *x.shape[2:])
    return F.group_norm(wide, n * layer.num_groups, weight, bias, layer.eps).view(x.shape)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, whose gradient reaches `x` and not the weights."""
    weight = cast(Tensor, layer.weight).detach()
    bias = None if layer.bias is None else cast(Tensor, layer.bias).detach()
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return cast(Tensor, layer._conv_forward(x, weight, bias))
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.linear(x, weight, bias)


def rows(layer: nn.Module, x: Tensor) -> int:
    """How many examples are in the layer's input; 0 where it is a single one without a dimension for it."""
    weight = cast(Tensor, layer.weight)
    least = {nn.Linear: 2, nn.GroupNorm: 2, nn.LayerNorm: 1 + weight.dim()}.get(type(layer), weight.dim())
    return len(x) if x.dim() >= least else 0


class Share:
    """The gradients of n records for one layer of a kind above, added up over its uses as they are differentiated."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._uses: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, g: Tensor) -> None:
        """One use: its input, and the gradient of the loss at its output."""
        layer, weight, bias = self.layer, cast(Tensor, self.layer.weight), cast(Tensor | None, self.layer.bias)
        x, g = x.detach().to(weight.dtype), g.to(weight.dtype)
        if bias is not None and bias.requires_grad:
            self._bias = _plus(self._bias, _over_positions(layer, g))
        if not weight.requires_grad:
            return
        if isinstance(layer, nn.LayerNorm):
            normalised = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            self._weight = _plus(self._weight, _over_positions(layer, g * normalised))
            return
        self._uses.append((x, g))
        if g.numel() > len(g) * len(weight) ** 2:  # more positions than outputs: what they add up to is smaller
            self._weight = _plus(self._weight, self._outer().dense())

    def _outer(self) -> Outer:
        xs, gs = zip(*self._uses, strict=True)
        self._uses = []
        return Outer(_outputs(self.layer, gs), _inputs(self.layer, xs), cast(Tensor, self.layer.weight).shape)

    def gradients(self) -> dict[nn.Parameter, Tensor | Outer]:
        """For each trained parameter, (n, *shape); only those that the loss depends on."""
        found: dict[nn.Parameter, Tensor | Outer] = {}
        if self._bias is not None:
            found[cast(nn.Parameter, self.layer.bias)] = self._bias
        weight: Tensor | Outer | None = self._weight
        if self._uses:
            outer = self._outer()
            weight = outer if weight is None and outer.small else _plus(self._weight, outer.dense())
        if weight is not None:
            found[cast(nn.Parameter, self.layer.weight)] = weight
        return found


def _outputs(layer: nn.Module, gs: Sequence[Tensor]) -> Tensor:
    """(n, T, outputs), of T positions in all."""
    linear = isinstance(layer, nn.Linear)
    return torch.cat([g.reshape(len(g), -1, g.shape[-1]) if linear else g.flatten(2).mT for g in gs], 1)


def _inputs(layer: nn.Module, xs: Sequence[Tensor]) -> Tensor:
    """(n, T, inputs), what the weights are multiplied with at each position; of convolutions kernel by channels."""
    if isinstance(layer, nn.Linear):
        return torch.cat([x.reshape(len(x), -1, x.shape[-1]) for x in xs], 1)
    windows = [_windows(cast(nn.Conv1d | nn.Conv2d, layer), x) for x in xs]
    spatial = xs[0].dim() - 2
    sizes = [math.prod(w.shape[1 : 1 + spatial]) for w in windows]
    found = xs[0].new_empty(len(xs[0]), sum(sizes), math.prod(windows[0].shape[1 + spatial :]))
    for w, part in zip(windows, torch.split(found, sizes, 1), strict=True):
        part.view(w.shape).copy_(w)
    return found


def _windows(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """(n, positions..., kernel..., channels) what a convolution sees at each position, as a view."""
    pads = [side for padding in reversed(cast(tuple[int, ...], layer.padding)) for side in (padding, padding)]
    x = F.pad(x.movedim(1, -1), (0, 0, *pads)).contiguous()  # channels last: whole runs of them are copied later
    n, *sides, channels = x.shape
    reaches = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    positions = [(a - b) // s + 1 for a, b, s in zip(sides, reaches, layer.stride, strict=True)]
    row, *steps, each = x.stride()
    along = [a * s for a, s in zip(steps, layer.stride, strict=True)]
    inside = [a * d for a, d in zip(steps, layer.dilation, strict=True)]
    return x.as_strided((n, *positions, *layer.kernel_size, channels), (row, *along, *inside, each))


def _over_positions(layer: nn.Module, g: Tensor) -> Tensor:
    """(n, *shape of the bias)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1]).sum(1)
    if isinstance(layer, nn.LayerNorm):
        return g.reshape(len(g), -1, *layer.normalized_shape).sum(1)
    return g.flatten(2).sum(2)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
