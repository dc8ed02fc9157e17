"""Losses that are sums over pairs: no softmax ties the pairs of a batch to each other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fedssl.losses._checks import check_batch, check_pair, check_temperature
from fedssl.losses.similarity import diagonal, product, unit, wide


def sigmoid_pair(z1: Tensor, z2: Tensor, *, temperature: float | Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """Tells each pair (z1_i, z2_j) by itself as belonging together or not: logistic regression on its similarity.

    With `s_ij = cos(z1_i, z2_j)`, `t` the temperature and `b` the bias,

        loss_i = softplus(-(s_ii / t + b)) + (1 / B) sum_{j != i} softplus(s_ij / t + b),

    so the sum over examples gives every positive pair the weight 1 and every negative pair the weight 1 / B. No softmax
    moves all pairs when one example changes: a pair's gradient is at most `weight / t` times that of its similarity, so
    with the latter clipped to C, an example more or less moves the sum's gradient by less than `4 C / t` for every B.
    SigLIP itself gives negatives the weight 1, B times more, and starts at the bias -10 to bear it.

    0 means that all pairs are told, `(2 - 1 / B) log 2` with bias 0 that all similarities are 0. A batch of one example
    has the positive term alone.

    Args:
        z1: (B, D), first view.
        z2: (B, D), second view of the same examples.
        temperature: > 0; logits are cosine / temperature + bias.
        bias: added to every logit; a number or a 0-d tensor, which may be learned.

    Returns:
        (B,), each value >= 0; row i has its own positive and the negatives `z2[j]`, so values change when the views
        change places, but not their mean.

    Raises:
        ConfigError: shapes that do not fit, an empty batch or a temperature that is not above 0.

    References:
        Zhai et al. 2023 (SigLIP), https://arxiv.org/abs/2303.15343
    """
    check_pair("z1", z1, "z2", z2)
    check_temperature(temperature)
    logits = product(unit(z1) / temperature, unit(z2).T) + bias  # (B, B)
    # softplus(x) is -logsigmoid(-x); torch's softplus is the identity above 20.
    together = -F.logsigmoid(logits.diagonal())
    apart = -F.logsigmoid(-logits)
    return together + apart.masked_fill(diagonal(apart), 0).sum(1) / len(z1)


def spectral(z1: Tensor, z2: Tensor) -> Tensor:
    """Factorises the matrix of which views go together: spectral contrastive loss.

    The population's loss `-2 E[z . z'] + E[(z . z-)^2]`, z' the other view of z and z- a view of an independent
    example, estimated from a batch without bias: pairs i = j for the first expectation, the B (B - 1) pairs i != j for
    the second,

        loss_i = -2 z1_i . z2_i + (1 / (B - 1)) sum_{j != i} (z1_i . z2_j)^2.

    Inner products of the embeddings as they are: nothing is normalised here and nothing bounds the norm. In a batch
    with B <= D orthogonal embeddings lower the loss as they grow, without end, so bound the norm before the call; the
    authors' code shortens rows to at most sqrt(mu) and divides the loss by mu. With unit rows -2 means that all pairs
    are found and all others orthogonal, -1 a collapse to one point; with zero rows the loss is 0.

    Args:
        z1: (B, D), first view, B >= 2.
        z2: (B, D), second view of the same examples.

    Returns:
        (B,), unbounded; row i has its own positive and the negatives `z2[j]`, and the mean is the loss.

    Raises:
        ConfigError: shapes that do not fit or fewer than two examples.

    References:
        HaoChen et al. 2021, https://arxiv.org/abs/2106.04156
    """
    check_pair("z1", z1, "z2", z2)
    check_batch(z1, "products of different examples")
    products = product(wide(z1), wide(z2).T)  # (B, B)
    apart = products.square().masked_fill(diagonal(products), 0)
    return apart.sum(1) / (len(z1) - 1) - 2 * products.diagonal()
