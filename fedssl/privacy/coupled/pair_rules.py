"""Losses that are sums over pairs of views: each pair's weight, and how far one record moves the clipped sum.

Both losses have the gradient `S = sum_ab W_ab grad s_ab` over ordered pairs of the batch's 2 n views, `s_ab` their
cosine. With every `grad s_ab` shortened to B, in a way that depends on views a and b only, a record moves S through its
own pairs and through the weights of all others. Temperatures are numbers here: nothing that a batch decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedssl.losses import nt_xent, sigmoid_pair

_VIEWS = 2**16  # batches up to which the bound is looked at one by one


class PairRule(Protocol):
    """A loss as weights of pairs."""

    def weights(self, scores: Tensor, temperature: float) -> Tensor:
        """(2 n, 2 n) the derivative of the loss, summed over records, by each score; 0 on the diagonal.

        Args:
            scores: (2 n, 2 n) cosines in [-1, 1] of all views; the first n rows are the records' first views.
            temperature: above 0.
        """
        ...

    def sensitivity(self, temperature: float) -> float:
        """How far adding or removing one record moves S at most, over B, in a batch of any size."""
        ...

    def value(self, first: Tensor, second: Tensor, temperature: float) -> Tensor:
        """() the mean loss of projections (n, K)."""
        ...


@dataclass(frozen=True)
class NTXentPairs:
    """NT-Xent of `fedssl.losses.nt_xent`: `W_ab = (p_ab - [b is a's other view]) / (2 t)`, p the softmax of row a."""

    def weights(self, scores: Tensor, temperature: float) -> Tensor:
        """See `PairRule`."""
        count = len(scores)
        shares = torch.softmax((scores / temperature).fill_diagonal_(-torch.inf), dim=1)
        partner = torch.arange(count, device=scores.device).roll(count // 2)
        positive = torch.zeros_like(scores).scatter_(1, partner[:, None], 1.0)
        return (shares - positive) / (2 * temperature)

    def sensitivity(self, temperature: float) -> float:
        """See `nt_xent_sensitivity`."""
        return nt_xent_sensitivity(temperature)

    def value(self, first: Tensor, second: Tensor, temperature: float) -> Tensor:
        """See `PairRule`."""
        return nt_xent(first, second, temperature=temperature).mean()


@dataclass(frozen=True)
class SigmoidRule:
    """The loss of `fedssl.losses.sigmoid_pair`: positives weigh 1, each of the n (n - 1) negatives 1 / n."""

    bias: float = 0.0

    def weights(self, scores: Tensor, temperature: float) -> Tensor:
        """See `PairRule`."""
        n = len(scores) // 2
        logits = scores[:n, n:] / temperature + self.bias
        block = torch.sigmoid(logits) / (n * temperature)
        block.diagonal().copy_(-torch.sigmoid(-logits.diagonal()) / temperature)
        found = torch.zeros_like(scores)
        found[:n, n:] = block
        return found

    def sensitivity(self, temperature: float) -> float:
        """The record's positive is at most `u / t`, u = sigmoid(1 / t - bias) the steepest slope of a positive.

        Its 2 (n - 1) negatives are `v / (n t)` each, v = sigmoid(1 / t + bias), and (n - 1) (n - 2) others go from
        weight 1 / n to 1 / (n - 1): together less than `3 v / t`. So less than `(u + 3 v) / t < 4 / t` for every n.
        """
        steepest, pushed = (_sigmoid(1 / temperature + sign * self.bias) for sign in (-1, 1))
        return (steepest + 3 * pushed) / temperature

    def value(self, first: Tensor, second: Tensor, temperature: float) -> Tensor:
        """See `PairRule`."""
        return sigmoid_pair(first, second, temperature=temperature, bias=self.bias).mean()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax_sensitivity(temperature: float, n: int | None = None) -> float:
    """The bound that knows of cosines only that they are in [-1, 1]; see `nt_xent_sensitivity`, which knows more.

    The two rows of the record vanish, each at most 2 B / t. In each of the N = 2 n - 2 other rows its two views have
    the mass m of the softmax, which moves to the other candidates: 2 m B / t. With the factor 1 / 2 of the loss that is
    `(2 + sum of m) B / t`, and `m <= 2 / (2 + (N - 1) e^(-2 / t))`.

    Args:
        temperature: t, above 0.
        n: records in the larger batch, at least 1; None: the supremum, `(2 + 2 e^(2 / t)) / t`.

    Returns:
        In units of B; infinite where the number is too large to write.

    References:
        Kong et al. 2023 (Logit-DP), https://arxiv.org/abs/2310.03104, with the weights of the loss that is really used
    """
    try:
        if n is None:
            return (2 + 2 * math.exp(2 / temperature)) / temperature
        others = 2 * n - 2
        return (2 + others * 2 / (2 + (others - 1) * math.exp(-2 / temperature))) / temperature
    except OverflowError:
        return math.inf


@lru_cache(maxsize=1024)
def nt_xent_sensitivity(temperature: float) -> float:
    """How far a record moves the sum of clipped pair gradients of NT-Xent, in batches of any size: `(2 + M) / t`.

    M bounds the softmax mass of the record's two views y, y' summed over the N = 2 n - 2 other rows; see
    `softmax_sensitivity` for the rest. There every row is taken by itself, as if all could lie on y and still be far
    from each other. They cannot, because rows are each other's candidates. Let x_a be the rows, |x_a| <= 1, and m their
    mean. By Jensen's inequality the other rows' part of a's denominator is

        sum_{b != a} e^(x_a.x_b / t) >= (N - 1) e^(x_a.m / t) e^(-2 / ((N - 1) t)),

    so the ratio r_a of the record's part and this one has the mean, over a,

        r <= e^(2 / ((N - 1) t)) / (N - 1) * mean_a (e^(x_a.(y - m) / t) + e^(x_a.(y' - m) / t)).

    With A = |y - m|, the numbers x_a.(y - m) are in [-A, A] and have the mean y.m - |m|^2 = 1 - A^2 - y.m <= A (1 - A),
    as 1 - y.m = y.(y - m) <= A; |y| = 1 is the worst, by convexity. An exponential is below its chord, so each mean is
    at most

        cosh(A / t) + (1 - A) sinh(A / t) = ((2 - A) e^(A / t) + A e^(-A / t)) / 2 <= t / (2 e) (e^(2 / t) + 1) =: G.

    Last, `r / (1 + r)` is concave, so `M <= N r / (1 + r)` with the largest r; M is also at most the sum of the bounds
    row by row. The supremum over N is looked up to N = 2^16; beyond it, `N r` is a bound that falls with N.

    Args:
        temperature: t, above 0.

    Returns:
        In units of B: 5.1 at t = 1, 24 at t = 0.5, where the bound row by row has 17 and 222.
    """
    largest = softmax_sensitivity(temperature)
    if not math.isfinite(largest):
        return math.inf
    others = np.arange(2, _VIEWS + 1, 2, dtype=np.float64)
    apart = np.minimum(others, others * 2 / (2 + (others - 1) * math.exp(-2 / temperature)))
    mean = temperature / math.e * (math.exp(2 / temperature) + 1)  # 2 G
    with np.errstate(over="ignore"):
        ratio = mean * np.exp(2 / ((others - 1) * temperature)) / (others - 1)
    together = others / (1 + 1 / ratio)
    tail = float(others[-1] * ratio[-1])
    mass = max(float(np.minimum(apart, together).max()), tail)
    return min((2 + mass) / temperature, largest)
