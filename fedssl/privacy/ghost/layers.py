"""What a layer with weights contributes to the gradients of records, from its inputs and its outputs' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
_OWN = {"weight", "bias"}
_SMALL = 4  # times the weights of a layer: a Gram matrix that costs more is not worth its while; measured on a CPU


@dataclass(frozen=True)
class Outer:
    """Gradients of n records that are sums of outer products, not multiplied out: `sum_t g[i, t] a[i, t]^T`.

    The length of one follows from inner products, `sum_st (g_s . g_t)(a_s . a_t)` (Goodfellow 2015,
    https://arxiv.org/abs/1510.01799; for convolutions Rochette et al. 2019, https://arxiv.org/abs/1912.06015), and a
    weighted sum over records is one matrix product, so none is ever held (Bu et al. 2022,
    https://arxiv.org/abs/2210.00038). t runs over positions *and* over all uses of the layer: views meet in the length.

    Attributes:
        g: (n, T, outputs) gradients of the loss at the layer's outputs.
        a: (n, T, inputs) what the weights were multiplied with.
        shape: of the weight.
    """

    g: Tensor
    a: Tensor
    shape: torch.Size

    def __len__(self) -> int:
        return len(self.g)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.g.device

    def lengths(self) -> tuple[Tensor, Tensor]:
        """(n,) float64 each: the lengths, and what they were if no two terms cancelled out."""
        g, a = self.g.double(), self.a.double()
        inner = torch.bmm(g, g.mT).mul_(torch.bmm(a, a.mT)).flatten(1).sum(1)
        return inner.clamp(min=0).sqrt(), g.flatten(1).norm(dim=1) * a.flatten(1).norm(dim=1)

    def weighted(self, factors: Tensor) -> Tensor:
        """The sum of the gradients times `factors` (n,)."""
        scaled = self.g * factors.to(self.g.dtype).view(-1, 1, 1)
        return (scaled.flatten(0, 1).T @ self.a.flatten(0, 1)).view(self.shape)

    def only(self, sound: Tensor) -> Outer:
        """Those of the records in `sound` (n,); zeros for the others, whatever they were."""
        g, a = (torch.where(sound.view(-1, 1, 1), x, torch.zeros_like(x)) for x in (self.g, self.a))
        return Outer(g, a, self.shape)

    def dense(self) -> Tensor:
        """(n, *shape) multiplied out."""
        return torch.bmm(self.g.mT, self.a).view(len(self), *self.shape)


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Attributes:
        x: (n, ...) its input.
        g: the gradient of the loss at its output.
    """

    x: Tensor
    g: Tensor


def known(layer: nn.Module) -> bool:
    """Whether the layer is of a kind below and takes its weights as they are, and some of them are trained."""
    if type(layer) not in KINDS or layer._parameters.get("weight") is None or not set(layer._parameters) <= _OWN:
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and any(p.requires_grad for p in layer.parameters())
    return any(p.requires_grad for p in layer.parameters())


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, whose gradient reaches `x` and not the weights."""
    weight = cast(Tensor, layer.weight).detach()
    bias = None if layer.bias is None else cast(Tensor, layer.bias).detach()
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.linear(x, weight, bias)


def gradients(layer: nn.Module, uses: Sequence[Use]) -> dict[nn.Parameter, Tensor | Outer]:
    """For each trained parameter of one layer, that of each record: the sum over all uses."""
    weight, bias = cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)
    found: dict[nn.Parameter, Tensor | Outer] = {}
    if bias is not None and bias.requires_grad:
        found[bias] = _sum(_over(layer, use.g) for use in uses)
    if not weight.requires_grad:
        return found
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        found[weight] = _sum(_over(layer, use.g * _normalised(layer, use.x)) for use in uses)
    else:
        pairs = [_matrices(layer, use) for use in uses]
        positions = sum(g.shape[1] for g, _ in pairs)
        inputs, outputs = weight.numel() // len(weight), len(weight)
        if positions**2 * (inputs + outputs) < _SMALL * weight.numel():
            found[weight] = Outer(*(torch.cat(parts, 1) for parts in zip(*pairs, strict=True)), weight.shape)
        else:
            each = torch.bmm(pairs[0][0].mT, pairs[0][1])
            for g, a in pairs[1:]:
                each.baddbmm_(g.mT, a)
            found[weight] = each.view(len(each), *weight.shape)
    return found


def _matrices(layer: nn.Module, use: Use) -> tuple[Tensor, Tensor]:
    """(n, T, outputs) and (n, T, inputs), whose outer products over the T positions add up to the weight's gradient."""
    n = len(use.x)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return use.g.reshape(n, -1, use.g.shape[-1]), use.x.reshape(n, -1, use.x.shape[-1])
    options = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    x = use.x
    if isinstance(layer, nn.Conv1d):  # an image one pixel high
        x = x.unsqueeze(2)
        options = tuple((neutral, *size) for neutral, size in zip((1, 1, 0, 1), options, strict=True))
    return use.g.flatten(2).mT, F.unfold(x, *options).mT


def _normalised(layer: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)


def _over(layer: nn.Module, g: Tensor) -> Tensor:
    """Summed over positions: (n, *shape of the bias)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1]).sum(1)
    if isinstance(layer, nn.LayerNorm):
        return g.reshape(len(g), -1, *layer.normalized_shape).sum(1)
    return g.flatten(2).sum(2) if g.dim() > 2 else g


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for other in others:
        first = first + other
    return first
