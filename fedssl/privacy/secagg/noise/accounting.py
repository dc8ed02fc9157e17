"""What a sum with distributed discrete Gaussian noise costs in privacy."""

from __future__ import annotations

import math


def rounded_norm(norm: float, dim: int) -> float:
    """The L2 norm, in steps of the grid, to which the rounding of a vector of this norm is held.

    A rounding at random exceeds it with probability exp(-1/2) at most, and is drawn again then.

    Args:
        norm: in steps, at least 0.
        dim: entries of the vector.

    References:
        Kairouz, Liu & Steinke 2021, https://arxiv.org/abs/2102.06387, theorem 1 with beta = exp(-1/2)
    """
    return math.sqrt(norm**2 + dim / 4 + norm + math.sqrt(dim) / 2)


def concentrated(norm: float, deviation: int, summands: int, dim: int) -> float:
    """The rho of zero-concentrated differential privacy of one noisy sum; infinite without noise.

    Neighbours differ in one client's vector, which is replaced by zeros: who takes part is no secret. The Renyi
    divergence of every order a between a sum of discrete Gaussians and that sum moved by `norm` is at most

        a / 2 (norm / (sqrt(summands) deviation) + tau sqrt(dim))^2,

    that of a Gaussian but for tau, which is what a sum of discrete Gaussians lacks to be one: below 1e-30 for
    deviations of 3 steps or more.

    Args:
        norm: that a client's vector of whole numbers can have.
        deviation: of each summand of the noise, in steps.
        summands: honest clients whose noise is in the sum, the fewest there may be.
        dim: entries of the vector.

    References:
        Kairouz, Liu & Steinke 2021, https://arxiv.org/abs/2102.06387, proposition 14
    """
    if deviation < 1 or summands < 1:
        return math.inf
    tau = 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, summands))
    return (norm / (math.sqrt(summands) * deviation) + tau * math.sqrt(dim)) ** 2 / 2
