"""Activation checkpointing: an encoder that keeps what goes into its blocks and computes the rest again when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedssl.networks.norms import is_norm, statistics_kept


@contextmanager
def recomputing(encoder: nn.Module) -> Iterator[None]:
    """Within, a pass with a gradient keeps only the inputs of the encoder's blocks, which run again going backward.

    The same numbers in the same order (Chen et al. 2016, https://arxiv.org/abs/1604.06174): the gradient is equal bit
    for bit where the layers are deterministic, and batch statistics are noted once. Costs one more forward pass of the
    encoder. The backward pass must end within. Passes without a gradient, such as a teacher's, are left alone.

    Blocks are the items of the outermost `nn.Sequential` and `nn.ModuleList` of the encoder: in a sequence a block
    begins at each layer with weights that is no norm. An encoder without either is one block.
    """
    replaced = list(_forwards(encoder))
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, _ in replaced:
            vars(module).pop("forward", None)


def _forwards(module: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Modules and what they call instead of their own forward pass."""
    containers = list(_containers(module))
    for container in containers:
        if type(container) is nn.Sequential:
            yield container, partial(_in_sequence, _blocks(container))
        else:
            yield from ((block, partial(_block, block)) for block in container.children())
    if not containers:
        yield module, partial(_block, module)


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost sequences and lists; what has a forward pass of its own is neither."""
    if type(module) in (nn.Sequential, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from _containers(child)


def _blocks(sequence: nn.Module) -> list[nn.Sequential]:
    cut: list[list[nn.Module]] = []
    for layer in sequence.children():
        begins = not is_norm(layer) and next(layer.parameters(), None) is not None
        if begins or not cut:
            cut.append([])
        cut[-1].append(layer)
    return [nn.Sequential(*layers) for layers in cut]


def _in_sequence(blocks: Sequence[nn.Module], x: Any) -> Any:
    for block in blocks:
        x = _block(block, x)
    return x


def _block(block: nn.Module, *inputs: Any) -> Any:
    def forward(*given: Any) -> Any:
        return type(block).forward(block, *given)  # its own, whatever stands in for it now

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_kept(block)

    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)
