"""Lower bounds of epsilon from what an attack got right: numbers in, one number out.

A bound at confidence 0.95 is above the true epsilon in at most one of twenty audits. It says that a mechanism is no
more private than that, never that it is as private.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError
from fedssl.privacy.release import gaussian_epsilon

_LARGEST = 64.0  # epsilon; e^64 is beyond what any number of runs can show


def rates(
    true_positives: int, positives: int, false_positives: int, negatives: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The least true-positive and the largest false-positive rate that the counts allow, jointly at this confidence.

    Clopper and Pearson's exact bounds, each at (1 + confidence) / 2. The counts must be of independent runs.

    Raises:
        ConfigError: counts out of range, or a confidence outside (0, 1).

    References:
        Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404
    """
    from scipy.stats import beta

    _confident(confidence)
    for hits, runs in ((true_positives, positives), (false_positives, negatives)):
        if not 0 <= hits <= runs or runs < 1:
            raise ConfigError(f"{hits} of {runs} runs is no count: give 0 <= count <= runs, and at least one run")
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, true_positives, positives - true_positives + 1) if true_positives else 0.0
    high = beta.ppf(1 - tail, false_positives + 1, negatives - false_positives) if false_positives < negatives else 1.0
    return float(low), float(high)


def epsilon_lower_bound(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """A lower bound of epsilon from independent runs with and without a record.

    Any test of an (epsilon, delta)-private mechanism has `TPR <= e^epsilon FPR + delta`, and the same with both worlds
    exchanged, so `epsilon >= ln((TPR - delta) / FPR)` and `ln((TNR - delta) / FNR)`; the rates are bounded by `rates`.
    The largest value a perfect attack can show is 3.98 with 200 runs of each world and 5.60 with 1000.

    Args:
        true_positives: runs with the record in which the test said so, of `positives`.
        false_positives: runs without it in which the test said it was there, of `negatives`.
        delta: of the claim, in [0, 1).
        confidence: that the bound holds, in (0, 1). The test must be fixed before these runs: see `split_bound`.

    Returns:
        At least 0, which says nothing.

    Raises:
        ConfigError: counts, delta or confidence out of range.

    References:
        Jagielski et al. 2020, https://arxiv.org/abs/2006.07709; Nasr et al. 2021, https://arxiv.org/abs/2101.04535
    """
    _delta_in_range(delta)
    tpr, fpr = rates(true_positives, positives, false_positives, negatives, confidence)
    pairs = ((tpr - delta, fpr), (1 - fpr - delta, 1 - tpr))  # the second: both worlds exchanged
    return max([0.0, *(math.log(more / less) for more, less in pairs if more > 0 and less > 0)])


def gdp_lower_bound(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """As `epsilon_lower_bound`, if the mechanism's trade-off curve is that of a Gaussian: ASSUMES GDP.

    `mu >= z(1 - FPR) - z(FNR)`, then epsilon at delta of a Gaussian mechanism with that mu. Far stronger with few runs,
    but no bound where the assumption fails: report it as "assumes GDP" only.

    References:
        Dong et al. 2019, https://arxiv.org/abs/1905.02383; Nasr et al. 2023, https://arxiv.org/abs/2302.07956
    """
    from scipy.stats import norm

    tpr, fpr = rates(true_positives, positives, false_positives, negatives, confidence)
    mu = float(norm.ppf(1 - fpr) - norm.ppf(1 - tpr)) if tpr > 0 and fpr < 1 else 0.0
    return gaussian_epsilon(1 / mu, 1, delta) if mu > 1e-6 else 0.0


def split_bound(
    present: NDArray[np.float64],
    absent: NDArray[np.float64],
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    bound: Callable[..., float] = epsilon_lower_bound,
) -> float:
    """The bound of the test `score >= threshold`, whose threshold is chosen on the first half of the runs.

    Choosing it on the runs that are counted would not be a test fixed in advance.

    Args:
        present: (R,) scores of independent runs with the record, R at least 2; larger says "it is there".
        absent: (S,) those of runs without it, S at least 2.
        delta, confidence: see `epsilon_lower_bound`.
        bound: `epsilon_lower_bound`, or `gdp_lower_bound`.

    Raises:
        ConfigError: fewer than two runs of a world, or scores that are not finite.
    """
    for scores in (present, absent):
        if len(scores) < 2 or not np.isfinite(scores).all():
            raise ConfigError(
                f"{len(scores)} scores cannot be halved, or some are not finite: give at least two finite ones a world"
            )
    (tune_in, test_in), (tune_out, test_out) = (np.array_split(scores, 2) for scores in (present, absent))

    def at(threshold: float, inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
        hits, alarms = int((inside >= threshold).sum()), int((outside >= threshold).sum())
        return bound(hits, len(inside), alarms, len(outside), delta=delta, confidence=confidence)

    candidates = np.quantile(np.concatenate((tune_in, tune_out)), np.linspace(0, 1, 65))
    middles = (candidates[1:] + candidates[:-1]) / 2  # between the worlds where they are apart
    best = max(middles, key=lambda threshold: at(threshold, tune_in, tune_out))
    return at(best, test_in, test_out)


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float = 0.0) -> float:
    """How likely at least so many correct guesses are, at most, under (epsilon, delta)-privacy.

    Each of m canaries was in the run by a fair coin of its own; r guesses were made and v are right:

        p = P[B >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= B < v] / i,   B ~ Binomial(r, 1 / (1 + e^-epsilon))

    References:
        Steinke, Nasr and Jagielski 2023, https://arxiv.org/abs/2305.08846, theorem 5.2
    """
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise ConfigError(
            f"{correct} right of {guesses} guesses on {canaries} canaries is no count: give 0 <= right <= guesses <= "
            "canaries, and at least one guess"
        )
    share = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, share))
    if delta > 0 and correct > 0:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, share))  # P[v - i <= B < v], i = 1 .. v
        tail += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail)


def one_run_lower_bound(
    correct: int,
    guesses: int,
    canaries: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    replaced: bool = False,
) -> float:
    """A lower bound of epsilon from a single run: the largest one that the guesses refuse.

    The largest value that all guesses right can show is 3.49 with 100 of them and 5.81 with 1000.

    Args:
        correct, guesses, canaries: see `one_run_p_value`; how many guesses are made must be fixed in advance.
        delta: of the claim, in [0, 1).
        confidence: in (0, 1).
        replaced: whether each coin decided which of two records was there, while epsilon is claimed for added or
            removed ones. Such a mechanism is (2 epsilon, (1 + e^epsilon) delta)-private for replaced records, so this
            game says half as much.

    Raises:
        ConfigError: counts, delta or confidence out of range.
    """
    _confident(confidence)
    _delta_in_range(delta)

    def refused(epsilon: float) -> bool:
        e, d = (2 * epsilon, min(1.0, (1 + math.exp(epsilon)) * delta)) if replaced else (epsilon, delta)
        return one_run_p_value(correct, guesses, canaries, e, d) <= 1 - confidence

    if not refused(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refused(high) and high < _LARGEST:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refused(middle) else (low, middle)
    return low


def guess_bound(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    replaced: bool = False,
    shares: tuple[float, ...] = (0.03, 0.1, 0.3, 0.8),
) -> float:
    """The best one-run bound over how many guesses are made, jointly at this confidence (Bonferroni).

    The canaries of the largest scores are guessed to be in, as many of the smallest out, the others not at all.

    Args:
        scores: (m,) of the canaries; larger says "it is in".
        included: (m,) the coins, which the scores must not have read.
        delta, confidence, replaced: see `one_run_lower_bound`.
        shares: of the canaries that are guessed, each in (0, 1]; not all, because the coins need not be balanced.

    Raises:
        ConfigError: fewer than two canaries, or scores that are not finite.
    """
    m = len(scores)
    if m < 2 or len(included) != m or not np.isfinite(scores).all():
        raise ConfigError(f"{m} scores and {len(included)} coins are no audit: give as many finite scores, at least 2")
    order = np.argsort(scores, kind="stable")
    best, joint = 0.0, 1 - (1 - confidence) / len(shares)
    for share in shares:
        half = max(1, round(share * m / 2 - 1e-9))
        half = min(half, m // 2)
        right = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
        found = one_run_lower_bound(right, 2 * half, m, delta=delta, confidence=joint, replaced=replaced)
        best = max(best, found)
    return best


def _confident(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} is no confidence: give a number in (0, 1), such as 0.95")


def _delta_in_range(delta: float) -> None:
    if not 0 <= delta < 1:
        raise ConfigError(f"delta={delta} is out of range: give a number in [0, 1)")
