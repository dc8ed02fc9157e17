"""Gradient inversion: images back from the gradient of one step, as a demonstration of what an update can show.

It is no bound. It assumes far more than a server of a real run knows: a batch of a few examples, one step, the very
random numbers of the augmentation. What it cannot do here, others may do better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import Batch, SSLMethod, Step, View
from fedssl.model import Model
from fedssl.networks.norms import discard_statistics

Draw = Callable[[Tensor], Sequence[View]]  # (B, C, H, W) in [0, 1] -> the views of that step, differentiable


@dataclass(frozen=True, eq=False)
class Inversion:
    """What came back.

    Attributes:
        images: (B, C, H, W) in [0, 1], in the order of the records.
        similarity: cosine between their gradient and the observed one, in [-1, 1].
        psnr: peak signal-to-noise ratio in dB against the records, mean over the batch.
        psnr_random: the same against other examples, each the best of as many as there are: what guessing gives.
    """

    images: Tensor
    similarity: float
    psnr: float
    psnr_random: float


def gradient_of(
    method: SSLMethod, model: Model, views: Sequence[View], *, differentiable: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of the loss on these views, of every trainable parameter; zeros where none flows."""
    batch = Batch(list(views), torch.arange(len(views[0]), device=next(model.parameters()).device))
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    out = method.loss(model, batch, Step(1, 1, 0, 1))
    found = torch.autograd.grad(out.loss, parameters, create_graph=differentiable, allow_unused=True)
    discard_statistics(model)
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))


def invert(
    method: SSLMethod,
    model: Model,
    observed: Sequence[Tensor],
    draw: Draw,
    shape: Sequence[int],
    *,
    steps: int = 200,
    lr: float = 0.1,
    smoothness: float = 1e-3,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Images whose gradient points where the observed one does.

    Minimises `1 - cosine + smoothness * total variation` by Adam, from grey noise, with the pixels kept in [0, 1].

    Args:
        method, model: as the client had them in that step.
        observed: the gradient of each trainable parameter.
        draw: the views of that step.
        shape: (B, C, H, W) of the batch.
        steps, lr, smoothness: of the search.
        generator: of the first guess.

    Returns:
        (B, C, H, W) in [0, 1], and the cosine that was reached.

    Raises:
        ConfigError: the observed gradient is zero or not finite.

    References:
        Geiping et al. 2020, https://arxiv.org/abs/2003.14053
    """
    target = torch.cat([g.detach().flatten() for g in observed])
    length = float(target.norm())
    if not (math.isfinite(length) and length > 0):
        raise ConfigError(
            f"the observed gradient has length {length}, so there is nothing to match: use a larger batch, for a "
            "contrastive loss of one example is constant"
        )
    guess = 0.5 + 0.1 * torch.randn(*shape, generator=generator, device=generator.device)
    guess = nn.Parameter(guess.to(target.device))
    optimizer = torch.optim.Adam([guess], lr=lr)
    best, image = -1.0, guess.detach().clone()
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * i / steps)) / 2
        gradient = torch.cat([g.flatten() for g in gradient_of(method, model, draw(guess), differentiable=True)])
        cosine = (gradient @ target) / (gradient.norm() * length).clamp(min=1e-20)
        if cosine.item() > best:
            best, image = cosine.item(), guess.detach().clone()
        loss = 1 - cosine + smoothness * total_variation(guess)
        (guess.grad,) = torch.autograd.grad(loss, (guess,))
        optimizer.step()
        with torch.no_grad():
            guess.clamp_(0, 1)
    return image, best


def judged(found: tuple[Tensor, float], records: Tensor, strangers: Tensor) -> Inversion:
    """Compare images with the records, in the order that fits best, and with as many other examples at a time.

    Args:
        found: what `invert` gives.
        records: (B, C, H, W) in [0, 1], B at most 6.
        strangers: (M, C, H, W) examples that were not in the batch, M at least B.
    """
    images, similarity = found
    ordered = _matched(images, records)
    groups = torch.split(strangers[: len(strangers) // len(images) * len(images)], len(images))
    random = [float(psnr(_matched(images, group), group).mean()) for group in groups]
    return Inversion(ordered, similarity, float(psnr(ordered, records).mean()), sum(random) / len(random))


def psnr(images: Tensor, records: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of images in [0, 1]: 10 is another picture, 20 the same one blurred."""
    error = (images - records).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-12))


def total_variation(images: Tensor) -> Tensor:
    """() mean absolute step between neighbouring pixels."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def _matched(images: Tensor, records: Tensor) -> Tensor:
    """The images in the order that is nearest to the records: a gradient is a sum, which has no order."""
    orders = itertools.permutations(range(len(images)))
    best = max(orders, key=lambda order: float(psnr(images[list(order)], records).mean()))
    return images[list(best)]
