"""Normalisation layers by one word of configuration, and batch statistics that change only when told to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError

KINDS = ("batch", "group", "layer", "none")


class _DeferredBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation whose forward pass leaves the running statistics alone.

    A loss must not change state (it is read for per-example gradients, probes and replays), so the forward pass only
    remembers the statistics of its batches; `commit` folds them into the buffers, once a step, in order of the calls.
    Same numbers as `torch.nn.BatchNorm*`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ConfigError(
                f"batch normalisation got an input of shape {tuple(input.shape)}; it needs (examples, channels, ...)"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if input.numel() // input.shape[1] < 2:
            raise ConfigError(
                "batch normalisation got one value per channel: a batch of one example has no statistics; "
                "use norm=group or norm=layer, or give each client more examples (partition.min_size)"
            )
        if input.dtype is self.weight.dtype:
            # Running statistics of momentum 1 are this batch's own. Torch finds them in any case; to ask for them
            # takes up to three times as long as to normalise.
            seen = input.new_zeros(input.shape[1]), input.new_zeros(input.shape[1])
            found = F.batch_norm(input, *seen, self.weight, self.bias, True, 1.0, self.eps)
        else:  # in half precision, where those of many models at once would have to be in half precision, too
            with torch.no_grad():
                variance, mean = torch.var_mean(input.float(), [0, *range(2, input.dim())], unbiased=True)
            seen = mean, variance
            found = F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        self._pending.append(seen)
        return found

    @torch.no_grad()
    def commit(self) -> None:
        """Fold the statistics of the batches seen since the last call into the running ones."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        for mean, variance in self._pending:
            for running, seen in ((self.running_mean, mean), (self.running_var, variance)):
                running.copy_(torch.lerp(running, seen.to(running), self.momentum or 0.1))
            self.num_batches_tracked.add_(1)
        self._pending.clear()


def commit_statistics(model: nn.Module) -> None:
    """Commit every deferred batch statistic of `model`; called by `fit` after each step."""
    for module in _deferred(model):
        module.commit()


def discard_statistics(model: nn.Module) -> None:
    """Forget what uncommitted forward passes have left."""
    for module in _deferred(model):
        module._pending.clear()


def _deferred(model: nn.Module) -> Iterator[_DeferredBatchNorm]:
    """Those of a model, in less time than `model.modules()`: each step asks. One that is there twice comes twice."""
    if isinstance(model, _DeferredBatchNorm):
        yield model
    for child in model._modules.values():
        if child is not None:
            yield from _deferred(child)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Forward passes within leave no statistics behind: they repeat passes that have left theirs."""
    before = [(module, len(module._pending)) for module in _deferred(model)]
    try:
        yield
    finally:
        for module, count in before:
            del module._pending[count:]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether some layer normalises over the examples of a batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def variance_keys(model: nn.Module) -> frozenset[str]:
    """The names of running variances: noise must not leave one below zero."""
    return frozenset(
        f"{prefix}.running_var"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: decided by its type, never by its name."""
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)


def norm2d(kind: str, channels: int) -> nn.Module:
    """A normalisation of (B, C, H, W): batch, group (at most 8 groups), layer (one group) or none."""
    if kind == "batch":
        return _DeferredBatchNorm(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    if kind == "layer":
        return nn.GroupNorm(1, channels)
    if kind == "none":
        return nn.Identity()
    raise ConfigError(f"norm={kind!r} is not a normalisation: choose one of {', '.join(KINDS)}")


def norm1d(kind: str, channels: int) -> nn.Module:
    """A normalisation of (B, C): batch, group (at most 8 groups), layer or none."""
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels, max(1, channels // 16)), channels)  # a group of one value is always 0
    if kind == "layer":
        norm = nn.LayerNorm(channels)
        # As autocast has it on a GPU. On a CPU torch mixes types in the gradients of single records.
        norm.register_forward_pre_hook(_in_its_own_type)
        return norm
    return norm2d(kind, channels)


def _in_its_own_type(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(cast(Tensor, norm.weight).dtype),)
