"""Loss functions of self-supervised learning: tensors in, one value per example out, nothing changed on the way.

Low-precision inputs (float16, bfloat16) are computed in float32, and autocast is switched off inside: at temperature
0.01 a similarity rounded to bfloat16 would move a logit by 0.4. No function here waits for the device.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.errors import ConfigError

_TINY_NORM = 1e-12  # a vector shorter than this has no direction


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    similarity: str = "cosine",
) -> Tensor:
    """Contrasts each anchor's positive with K negatives: `-log softmax` of the positive among 1 + K candidates.

    0 means that the positive is certain, `log(1 + K)` that all candidates look alike (collapse, or no learning yet).
    Gradients flow into every argument: detach a queue or a teacher's output before the call.

    Args:
        anchor: (B, D).
        positive: (B, D), row i belongs to anchor i.
        negatives: (K, D) shared by all anchors, or (B, K, D) own negatives of each; K may be 0. None takes the other
            positives of the batch: row i has the candidates `positive[j]`, so K = B - 1, and a batch of one example has
            the single candidate and the loss 0.
        temperature: > 0; logits are similarity / temperature. Usual values are 0.05 to 0.5; 0.01 is stable.
        similarity: "cosine", in which a zero vector has similarity 0 with everything, or "dot".

    Returns:
        (B,), each value >= 0.

    Raises:
        ConfigError: shapes that do not fit, an empty batch, an unknown similarity or a temperature that is not above 0.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; He et al. 2020 (queue), https://arxiv.org/abs/1911.05722
    """
    _check_pair("anchor", anchor, "positive", positive)
    _check_temperature(temperature)
    if negatives is not None:
        _check_negatives(negatives, anchor)
    if similarity == "cosine":
        anchor, positive = _unit(anchor), _unit(positive)
        negatives = None if negatives is None else _unit(negatives)
    elif similarity == "dot":
        anchor, positive = _wide(anchor), _wide(positive)
        negatives = None if negatives is None else _wide(negatives)
    else:
        raise ConfigError(f"The similarity {similarity!r} is not known; use 'cosine' or 'dot'.")

    if negatives is None:
        logits = _product(anchor / temperature, positive.T)  # (B, B), the positive of row i in column i
        return -torch.log_softmax(logits, dim=1).diagonal()
    if negatives.ndim == 2:
        against = _product(anchor, negatives.T)  # (B, K)
    else:
        against = _product(negatives, anchor.unsqueeze(2)).squeeze(2)  # (B, K, D) x (B, D, 1) -> (B, K)
    own = (anchor * positive).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([own, against], dim=1) / temperature  # (B, 1 + K)
    return -torch.log_softmax(logits, dim=1)[:, 0]


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    """Contrasts the two views of each example with the 2B - 2 other views of the batch (SimCLR).

    A view never is its own candidate: the diagonal is masked, not multiplied by 0, which would leave `exp(0)` in every
    denominator and matter most for the small batches of small clients. 0 means that all pairs are found, `log(2B - 1)`
    that all views look alike. A batch of one example has one candidate and the loss 0.

    Args:
        z1: (B, D), first view.
        z2: (B, D), second view of the same examples.
        temperature: > 0; logits are cosine / temperature.

    Returns:
        (B,), each value >= 0: the mean of the directions z1 -> z2 and z2 -> z1.

    Raises:
        ConfigError: shapes that do not fit, an empty batch or a temperature that is not positive.

    References:
        Chen et al. 2020, https://arxiv.org/abs/2002.05709
    """
    _check_pair("z1", z1, "z2", z2)
    _check_temperature(temperature)
    b = len(z1)
    z = torch.cat([_unit(z1), _unit(z2)])  # (2B, D)
    logits = _product(z / temperature, z.T).fill_diagonal_(-torch.inf)  # (2B, 2B)
    partner = torch.arange(2 * b, device=z.device).roll(b)  # row i of z1 has column B + i, of z2 column i
    both = F.cross_entropy(logits, partner, reduction="none")
    return (both[:b] + both[b:]) / 2


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Pulls the prediction p towards the target z, which gets no gradient: `-cos(p, stopgrad(z))`.

    -1 means equal directions, 0 orthogonal, 1 opposite. A collapsed encoder reaches -1 as well: a low loss is no proof
    of good features. BYOL's loss is `2 + 2 * negative_cosine(p, z)`. One example's loss reads no other example.

    Args:
        p: (B, D), the predictor's output.
        z: (B, D), the target of the same examples; detached here.

    Returns:
        (B,), in [-1, 1]; 0 where either vector is zero.

    Raises:
        ConfigError: shapes that do not fit or an empty batch.

    References:
        Chen & He 2021, https://arxiv.org/abs/2011.10566; Grill et al. 2020, https://arxiv.org/abs/2006.07733
    """
    _check_pair("p", p, "z", z)
    # Rounding can leave [-1, 1] by one unit in the last place; the gradient is 0 there, the clamp takes nothing away.
    return -(_unit(p) * _unit(z.detach())).sum(1).clamp(-1, 1)


class VICRegTerms(NamedTuple):
    """The weighted sum of VICReg's terms, and the terms themselves, unweighted; each ()."""

    total: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg(
    z1: Tensor, z2: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> VICRegTerms:
    """Pulls two views together, keeps every dimension's deviation above 1 and the dimensions uncorrelated.

    As in the authors' code: invariance is the mean squared error over B x D; variance is the mean of both views' mean
    hinge `max(0, 1 - sqrt(var + 1e-4))`, 0.99 for a collapsed network; covariance is the sum of both views' squared
    off-diagonal covariances, divided by D. Variances and covariances divide by B - 1.

    Args:
        z1, z2: (B, D) projections of the two views, B >= 2; not normalised.
        invariance, variance, covariance: weights of the terms, >= 0.

    Raises:
        ConfigError: shapes that do not fit, fewer than two examples or a negative weight.

    References:
        Bardes et al. 2022, https://arxiv.org/abs/2105.04906, equations 1 to 6
    """
    _check_pair("z1", z1, "z2", z2)
    _check_batch(z1, "variances")
    if min(invariance, variance, covariance) < 0:
        raise ConfigError(
            f"VICReg's weights are {invariance}, {variance}, {covariance}; a negative one rewards collapse: "
            "use 0 or more."
        )
    views = _wide(z1), _wide(z2)
    distance = F.mse_loss(*views)
    spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in views) / 2
    n, d = z1.shape
    shared = views[0].new_zeros(())
    for z in views:
        centred = z - z.mean(0)
        matrix = _product(centred.T, centred) / (n - 1)  # (D, D)
        shared = shared + (matrix.square().sum() - matrix.diagonal().square().sum()) / d
    spread = torch.as_tensor(spread)
    total = invariance * distance + variance * spread + covariance * shared
    return VICRegTerms(total, distance, spread, shared)


def barlow_twins(z1: Tensor, z2: Tensor, *, off_diagonal: float) -> Tensor:
    """Pushes the cross-correlation matrix of two views, over the batch, towards the identity.

    Each view is standardised over the batch (biased variance, eps 1e-5, as an affine-free batch normalisation); the
    loss is `sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2`. A collapsed network has C = 0 and the loss D.

    Args:
        z1, z2: (B, D) projections of the two views, B >= 2.
        off_diagonal: weight of the redundancy term, >= 0; 0.005 in the paper.

    Returns:
        (), the loss.

    Raises:
        ConfigError: shapes that do not fit, fewer than two examples or a negative weight.

    References:
        Zbontar et al. 2021, https://arxiv.org/abs/2103.03230, equations 1 and 2
    """
    _check_pair("z1", z1, "z2", z2)
    _check_batch(z1, "correlations")
    if off_diagonal < 0:
        raise ConfigError(f"off_diagonal is {off_diagonal}; a negative weight rewards redundancy: use 0 or more.")
    a, b = (F.batch_norm(_wide(z), None, None, training=True, eps=1e-5) for z in (z1, z2))
    matrix = _product(a.T, b) / len(z1)  # (D, D)
    on = (1 - matrix.diagonal()).square().sum()
    off = matrix.square().sum() - matrix.diagonal().square().sum()
    return on + off_diagonal * off


def _wide(x: Tensor) -> Tensor:
    """The same values in at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unit(x: Tensor) -> Tensor:
    """Rows at length 1, shape kept; a zero row stays zero and its gradient stays finite and of usual size."""
    x = _wide(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > _TINY_NORM, norm, 1.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the precision of its arguments, also under autocast."""
    device = a.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if on else contextlib.nullcontext():
        return a @ b


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    for name, x in ((name_a, a), (name_b, b)):
        if x.ndim != 2 or x.numel() == 0:
            raise ConfigError(
                f"{name} has the shape {tuple(x.shape)}, but a loss is per example and needs (B, D) with at least one "
                "example and one dimension; flatten the features, or skip an empty batch."
            )
        if not x.is_floating_point():
            raise ConfigError(f"{name} holds {x.dtype}, which has no gradient; pass floating-point embeddings.")
    if a.shape != b.shape:
        raise ConfigError(
            f"{name_a} has the shape {tuple(a.shape)} and {name_b} {tuple(b.shape)}, so rows cannot be paired; pass "
            "two views of the same examples in one order and one dimension."
        )


def _check_batch(z: Tensor, what: str) -> None:
    if len(z) < 2:
        raise ConfigError(
            f"This loss takes {what} over the batch and got one example; give each client more examples "
            "(partition.min_size) or larger batches, or choose a method that takes examples one by one, such as byol."
        )


def _check_negatives(negatives: Tensor, anchor: Tensor) -> None:
    b, d = anchor.shape
    shape = tuple(negatives.shape)
    if len(shape) not in (2, 3) or shape[-1] != d or (len(shape) == 3 and shape[0] != b):
        raise ConfigError(
            f"negatives has the shape {shape} beside anchors of ({b}, {d}), so they cannot be compared; pass (K, {d}) "
            f"shared by the batch or ({b}, K, {d}) for each anchor."
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:  # also refuses nan
        raise ConfigError(
            f"The temperature is {temperature}, but similarities are divided by it; set a value above 0, often 0.1."
        )
