"""What the optimal critic of InfoNCE is (T3), on finite sets where every expectation is a sum."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, distribution, matrix, shares

_MOST_TERMS = 20_000_000  # sums of more terms than this are refused: about 2 s and 500 MiB


def optimal_critic(joint: ArrayLike, noise: ArrayLike, *, offset: ArrayLike = 0.0) -> Array:
    """Gives the critic that no other beats in InfoNCE: `log p(y|x) - log q(y) + c(x)`.

    Args:
        joint: (X, Y), p(x, y), sums to 1; every x has some mass.
        noise: (Y,), q(y), what negatives are drawn from.
        offset: c(x), (X,) or one number; it changes no loss.

    Returns:
        (X, Y). `-inf` where y never follows x. `+inf` where y follows x but is never a negative: seeing y gives the
        positive away, and a trained critic grows without end.

    Raises:
        ConfigError: a joint or noise that is no distribution, an x without mass, or shapes that do not fit.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, section 2.3; Ma & Collins 2018 (noise other than
        the marginal), https://arxiv.org/abs/1809.01812
    """
    p, q = _joint_and_noise(joint, noise)
    given = p / p.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        ratio = np.where(given > 0, np.log(given) - np.where(given > 0, np.log(q), 0.0), -np.inf)
    return ratio + np.broadcast_to(np.asarray(offset, dtype=np.float64), (len(p),))[:, None]


def expected_info_nce(critic: ArrayLike, joint: ArrayLike, noise: ArrayLike, negatives: int) -> float:
    """Gives the expected InfoNCE loss of any critic, exactly: a sum over all positives and all tuples of negatives.

    Tuples that are reorderings of one another have one loss and are summed once, with their multinomial probability.

    Args:
        critic: (X, Y) scores, already divided by the temperature; `+inf` and `-inf` are allowed, nan is not.
        joint: (X, Y), p(x, y); positives follow p(y|x).
        noise: (Y,), q(y); the K negatives are independent draws.
        negatives: K >= 0.

    Returns:
        The loss in nats, >= 0; `log(1 + K)` for a constant critic, `inf` when a possible positive has the score -inf.

    Raises:
        ConfigError: shapes that do not fit, no distribution, or more than 20 million terms.
    """
    p, q = _joint_and_noise(joint, noise)
    s = matrix("critic", critic)
    if s.shape != p.shape or np.isnan(s).any():
        raise ConfigError(f"The critic is {s.shape} or holds nan beside a joint of {p.shape}; score every pair.")
    support = np.flatnonzero(q)
    k = at_least("negatives", negatives, 0)
    tuples = math.comb(len(support) + k - 1, k)
    if tuples * p.size * max(k, 1) > _MOST_TERMS:
        raise ConfigError(
            f"{tuples} sets of {k} negatives for {p.size} pairs are too many to sum; take fewer negatives or outcomes."
        )
    chosen = np.array(list(itertools.combinations_with_replacement(support, k)), dtype=np.int64)  # (T, K)
    chosen = chosen.reshape(tuples, k)
    counts = np.stack([(chosen == y).sum(1) for y in support], axis=1)  # (T, support)
    orders = np.array([math.lgamma(k + 1) - sum(math.lgamma(c + 1) for c in row) for row in counts.tolist()])
    chance = np.exp(orders + counts @ np.log(q[support]))  # (T,), sums to 1
    loss = 0.0
    for x, y in zip(*np.nonzero(p), strict=True):
        if s[x, y] == np.inf:
            continue  # the positive wins against whatever is drawn: the loss is 0
        if s[x, y] == -np.inf:
            return math.inf
        margin = s[x][chosen] - s[x, y]  # (T, K)
        each = np.logaddexp.reduce(np.concatenate([np.zeros((tuples, 1)), margin], axis=1), axis=1)
        loss += float(p[x, y] * (chance @ each))
    return loss


def optimal_info_nce(joint: ArrayLike, noise: ArrayLike, negatives: int) -> float:
    """Gives the least expected InfoNCE loss that any critic reaches, exactly.

    Args:
        joint: (X, Y), p(x, y).
        noise: (Y,), q(y).
        negatives: K >= 0.

    Returns:
        The loss in nats. With q the marginal of y, `log(1 + K)` minus it is at most the mutual information.

    Raises:
        ConfigError: as `expected_info_nce`.
    """
    return expected_info_nce(optimal_critic(joint, noise), joint, noise, negatives)


def critic_bias(noises: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Gives what is wrong with the average of local critics: `log q(y) - sum_k w_k log q_k(y)`, q the mean of q_k.

    Client k draws its negatives from its own q_k, so its optimum is `log p(y|x) - log q_k(y)`; the critic of one
    trainer with all data is `log p(y|x) - log q(y)`. Local and global differ by `log q(y) / q_k(y)`.

    Args:
        noises: (M, Y), row k is client k's q_k.
        weights: (M,), >= 0; None weighs clients alike.

    Returns:
        (Y,), average minus global, nowhere below 0 (Jensen) and 0 everywhere only for equal clients. Its mean under q
        is `sum_k w_k KL(q | q_k)`. Only differences between two y matter: a constant would be part of c(x). Outcomes
        that are rare at some clients are scored too high, and `inf` marks those that one client never draws. A y
        that nobody draws is nan.

    Raises:
        ConfigError: rows that are no distributions, or weights that do not fit.
    """
    q = np.stack([distribution(f"The noise of client {k}", row) for k, row in enumerate(matrix("noises", noises))])
    w = shares(weights, len(q))
    q, w = q[w > 0], w[w > 0]
    mean = w @ q
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(np.where(mean > 0, np.log(mean) - w @ np.log(q), np.nan), 0.0)  # rounding may go below 0


def _joint_and_noise(joint: ArrayLike, noise: ArrayLike) -> tuple[Array, Array]:
    p, q = distribution("joint", matrix("joint", joint)), distribution("noise", noise)
    if q.shape != p.shape[1:]:
        raise ConfigError(f"The noise is {q.shape} beside a joint of {p.shape}; give q one value for each column.")
    if not np.all(p.sum(1) > 0):
        raise ConfigError("The joint has a row without mass, for which p(y|x) means nothing; leave that x out.")
    return p, q
