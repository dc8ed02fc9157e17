"""The temperature that suits given statistics of Gaussian scores (T7): two rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from fedssl.errors import ConfigError
from fedssl.theory.checks import at_least
from fedssl.theory.scores import gradient_snr, positive_probability

LOWEST, HIGHEST = 0.01, 10.0  # where rules look: below, float32 similarities are coarse; above, all weights are equal
NOISE_FLOOR = 1.0  # std of the gradient's other noise, per unit of score: puts cosine scores at 0.1 to 0.3


def for_target_probability(
    positive_mean: float,
    negative_mean: float,
    negatives: int,
    probability: float,
    *,
    positive_std: float = 0.0,
    negative_std: float = 0.0,
) -> float:
    """Gives the temperature at which the positive's mean softmax probability is p*.

    Where scores do not vary: `t = (mu_p - mu_n) / ln(K p* / (1 - p*))`. Otherwise E[p] = p* is solved by bisection,
    with E[p] over independent Gaussian scores by quadrature, without approximation of the log-sum-exp.

    Args:
        positive_mean, negative_mean: mean scores (similarities) of positives and negatives.
        negatives: K >= 1.
        probability: p*, in (0, 1).
        positive_std, negative_std: standard deviations of the scores, >= 0.

    Returns:
        t > 0. E[p] need not be monotone: of several solutions the largest. It is looked for between a hundredth and ten
        thousand times the size of the scores' differences (means or deviations, whichever is larger).

    Raises:
        ConfigError: a number out of range, or a p* that no temperature reaches: as t grows E[p] goes to 1 / (1 + K), as
            t falls to the chance that the positive scores highest.
    """
    if not 0 < probability < 1:
        raise ConfigError(f"The target probability is {probability}; pass a number between 0 and 1, often 0.5.")
    k, gap = at_least("negatives", negatives, 1), positive_mean - negative_mean
    if positive_std == negative_std == 0:
        odds = math.log(k) + math.log(probability) - math.log1p(-probability)
        if odds != 0 and 0 < gap / odds < math.inf:
            return gap / odds
        ends = [1 / (1 + k), 1 / (1 + k) if gap == 0 else float(gap > 0)]
    else:
        stats = (positive_mean, positive_std, negative_mean, negative_std, k)
        size = max(abs(gap), positive_std, negative_std)

        def excess(decades: float) -> float:
            return positive_probability(size * 10**decades, *stats) - probability

        tried = [(4 - i / 10, excess(4 - i / 10)) for i in range(61)]
        for (high, one), (low, other) in itertools.pairwise(tried):
            if (one > 0) != (other > 0):
                return float(size * 10 ** _root(excess, low, high, other))
        ends = [probability + e for _, e in tried]
    raise ConfigError(
        f"No temperature gives the positive the probability {probability} among {k} negatives with the mean scores "
        f"{positive_mean} and {negative_mean}; choose one between {min(ends):.3g} and {max(ends):.3g}."
    )


def max_snr(
    positive_mean: float,
    positive_std: float,
    negative_mean: float,
    negative_std: float,
    negatives: int,
    *,
    noise_floor: float = NOISE_FLOOR,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> float:
    """Gives the temperature at which the positive's gradient (p - 1) / t has the largest signal-to-noise ratio.

    Args:
        positive_mean, positive_std, negative_mean, negative_std, negatives: of the Gaussian scores, as `gradient_snr`.
        noise_floor: > 0, in units of the gradient. Without a floor the ratio grows with t without end. The larger it
            is, the lower the temperature.
        lowest, highest: the range searched, 0 < lowest < highest.

    Returns:
        t in [lowest, highest]. An end of the range means that the ratio still rises there: lowest where positives score
        no higher than negatives, highest with next to no floor.

    Raises:
        ConfigError: a number out of range.
    """
    check_floor(noise_floor)
    check_range(lowest, highest)

    def snr(log_t: float) -> float:
        t = math.exp(log_t)
        return gradient_snr(t, positive_mean, positive_std, negative_mean, negative_std, negatives, noise_floor)

    points = 48
    start, step = math.log(lowest), (math.log(highest) - math.log(lowest)) / points
    values = [snr(start + i * step) for i in range(points + 1)]
    best = max(range(points + 1), key=values.__getitem__)
    low, high = start + max(best - 1, 0) * step, start + min(best + 1, points) * step
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if snr(left) >= snr(right) else (left, high)
    inside = (low + high) / 2
    return math.exp(inside if snr(inside) >= values[best] else start + best * step)


def _root(f: Callable[[float], float], low: float, high: float, at_low: float) -> float:
    """Where f changes its sign between low and high, by bisection to rounding."""
    for _ in range(60):
        middle = (low + high) / 2
        found = f(middle)
        if (found > 0) == (at_low > 0):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def check_floor(value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(
            f"The noise floor is {value}, but without one the signal-to-noise ratio grows with the temperature without "
            f"end; set a finite value above 0, such as {NOISE_FLOOR}."
        )


def check_range(lowest: float, highest: float) -> None:
    if not 0 < lowest < highest < math.inf:
        raise ConfigError(f"The temperatures range from {lowest} to {highest}; set 0 < lowest < highest.")
