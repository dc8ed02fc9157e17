"""Losses of a batch's statistics: one value for the batch, none for an example."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses._checks import check_batch, check_embeddings, check_pair
from fedssl.losses.similarity import diagonal, product, wide


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
    check_pair("z1", z1, "z2", z2)
    check_batch(z1, "variances")
    if min(invariance, variance, covariance) < 0:
        raise ConfigError(
            f"VICReg's weights are {invariance}, {variance}, {covariance}; a negative one rewards collapse: "
            "use 0 or more."
        )
    views = wide(z1), wide(z2)
    distance = F.mse_loss(*views)
    spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in views) / 2
    n, d = z1.shape
    shared = views[0].new_zeros(())
    for z in views:
        centred = z - z.mean(0)
        matrix = product(centred.T, centred) / (n - 1)  # (D, D)
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
    check_pair("z1", z1, "z2", z2)
    check_batch(z1, "correlations")
    if off_diagonal < 0:
        raise ConfigError(f"off_diagonal is {off_diagonal}; a negative weight rewards redundancy: use 0 or more.")
    a, b = (F.batch_norm(wide(z), None, None, training=True, eps=1e-5) for z in (z1, z2))
    matrix = product(a.T, b) / len(z1)  # (D, D)
    on = (1 - matrix.diagonal()).square().sum()
    off = matrix.square().sum() - matrix.diagonal().square().sum()
    return on + off_diagonal * off


def decorrelation(z: Tensor) -> Tensor:
    """Pushes the correlations of the dimensions over the batch towards 0, against dimensional collapse (FedDecorr).

    As in the authors' code: columns are standardised over the batch (variances divide by B - 1, eps 1e-8), and with
    `K = z^T z` of those the loss is `mean_{i != j} K_ij^2 / B`. 0 means uncorrelated columns, `(B - 1)^2 / B` perfectly
    correlated ones: it grows with the batch. Columns without any variance have correlation 0, so that a complete
    collapse is not seen. The paper adds it to any loss with the coefficient 0.1.

    Args:
        z: (B, D) embeddings. A batch of one example and a single dimension have no correlations: the loss and its
            gradient are 0.

    Returns:
        (), the loss, in [0, (B - 1)^2 / B].

    Raises:
        ConfigError: a shape that is not (B, D), or an empty batch.

    References:
        Shi et al. 2023, https://arxiv.org/abs/2210.00226, section 4; the division by B is the code's
    """
    check_embeddings("z", z)
    n, d = z.shape
    z = wide(z)
    centred = z - z.mean(0)
    variance = centred.square().sum(0) / max(n - 1, 1)  # (D,); 0 and not nan for one example
    standard = centred / (variance + 1e-8).sqrt()
    matrix = product(standard.T, standard)  # (D, D)
    return matrix.masked_fill(diagonal(matrix), 0).square().sum() / (max(d * (d - 1), 1) * n)
