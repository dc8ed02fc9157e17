"""T6's instruments: methods that report the vectors a similarity compares, and embeddings without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedssl import seeds
from fedssl.losses import nt_xent
from fedssl.method import Batch, LossOutput, Step
from fedssl.methods.simclr import SimCLR
from fedssl.methods.simsiam import SimSiam
from fedssl.model import Model


@dataclass(frozen=True)
class WatchedSimCLR(SimCLR):
    """SimCLR that also reports length and radial gradient of its projections, as the round's means."""

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """SimCLR's loss."""
        return _watched(lambda: SimCLR.loss(self, model, batch, step), model, "projector")


@dataclass(frozen=True)
class WatchedSimSiam(SimSiam):
    """SimSiam that also reports those of its predictions: the gradient stops at what they are compared with."""

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """SimSiam's loss."""
        return _watched(lambda: SimSiam.loss(self, model, batch, step), model, "predictor")


def _watched(loss: Callable[[], LossOutput], model: Model, part: str) -> LossOutput:
    """A loss with measures of the outputs of a part: their length, and `<z, dL/dz> / (|z| |dL/dz|)` and its size."""
    seen: list[Tensor] = []
    handle = model[part].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        out = loss()
    finally:
        handle.remove()
    gradients = torch.autograd.grad(out.loss, seen, retain_graph=True)
    radial = torch.cat([_radial(z.detach(), g) for z, g in zip(seen, gradients, strict=True)])
    length = torch.cat([z.detach().norm(dim=1) for z in seen]).mean()
    return replace(out, aux={**out.aux, "length": length, "radial": radial.mean(), "radial_size": radial.abs().mean()})


def _radial(z: Tensor, gradient: Tensor) -> Tensor:
    size = z.norm(dim=1) * gradient.norm(dim=1)
    found: Tensor = (z * gradient).sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return found


def free_descent(similarity: str, rate: float, time: float, temperature: float, seed: int) -> tuple[float, float]:
    """Gradient descent on embeddings themselves, 32 pairs in 16 dimensions, in float64.

    Args:
        similarity: "cosine" or "dot".
        rate: of a step; there are `time / rate` steps.
        time: rate times steps, the same for all rates that are compared.
        temperature: of NT-Xent.
        seed: names the start.

    Returns:
        The mean over embeddings of `log |z_end| / |z_start|`, and the share of the change of |z|^2 that is of second
        order, `rate^2 sum |g|^2 / (|z_end|^2 - |z_start|^2)`, which is 1 for orthogonal gradients.
    """
    z = torch.randn(2, 32, 16, generator=seeds.torch_stream(seed, "study", "free"), dtype=torch.float64)
    z = z / z.norm(dim=2, keepdim=True)
    start, second = z.square().sum(2), torch.zeros(2, 32, dtype=torch.float64)
    for _ in range(max(1, round(time / rate))):
        z.requires_grad_()
        loss = nt_xent(z[0], z[1], temperature=temperature, similarity=similarity).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        second += rate**2 * gradient.square().sum(2)
        z = (z - rate * gradient).detach()
    end = z.square().sum(2)
    return float((end / start).log().mean() / 2), float(second.sum() / np.maximum(1e-300, float((end - start).sum())))
