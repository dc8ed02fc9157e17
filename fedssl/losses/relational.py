"""Losses that compare how examples lie to one another, whatever space they lie in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedssl.losses._checks import check_pair, check_temperature
from fedssl.losses.similarity import product, unit


def relations(z: Tensor, anchors: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Says how alike each example is to every other: log-softmax of its cosines to the anchors, its own left out.

    Args:
        z: (B, D).
        anchors: (B, D), the same examples in the same order, in the same space; another view of them, say.
        temperature: > 0; logits are cosine / temperature. The lower, the more the nearest neighbours count.

    Returns:
        (B, B - 1), logarithms of a distribution over the others in their order; empty for one example.

    Raises:
        ConfigError: shapes that do not fit, an empty batch or a temperature that is not above 0.
    """
    check_pair("z", z, "anchors", anchors)
    check_temperature(temperature)
    logits, b = product(unit(z) / temperature, unit(anchors).T), len(z)  # (B, B)
    if b == 1:
        return logits[:, :0]
    others = logits.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)  # all but the diagonal
    return torch.log_softmax(others, dim=1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compares two distributions by the Jensen-Shannon divergence: the mean of their KL divergences to their mean.

    Args:
        log_p, log_q: (B, K), logarithms of distributions.

    Returns:
        (B,), in [0, log 2]: 0 for equal ones, log 2 for those that share nothing; 0 where K is 0.

    References:
        Han et al. 2022, https://arxiv.org/abs/2207.09158 (FedX). Their released code has the arguments of KL the other
        way round, the mean's to each, which nothing bounds.
    """
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    forth, back = (one.exp() * (one - middle) for one in (log_p, log_q))
    return (forth + back).sum(1) / 2


def kullback_leibler(log_target: Tensor, log_q: Tensor) -> Tensor:
    """Compares a distribution with a target by `sum_k target_k (log target_k - log q_k)`; the target gets no gradient.

    Args:
        log_target, log_q: (B, K), logarithms of distributions.

    Returns:
        (B,), each value >= 0, 0 for equal ones.
    """
    log_target = log_target.detach()
    return (log_target.exp() * (log_target - log_q)).sum(1)
