"""The accounted cost of sums of discrete Gaussians against the exact one, by summing over all outcomes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from fedssl.errors import ConfigError
from fedssl.privacy.accountant import Release, compose
from fedssl.privacy.release import concentrated_epsilon, gaussian_epsilon
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.noise import accounting
from fedssl.privacy.secagg.noise.noisy import Noisy


def masses(deviation: int, summands: int) -> np.ndarray:
    """The distribution of a sum of discrete Gaussians, by convolution; its middle is 0."""
    support = np.arange(-12 * deviation, 12 * deviation + 1)
    one = np.exp(-(support**2) / (2 * deviation**2))
    one /= one.sum()
    out = np.ones(1)
    for _ in range(summands):
        out = np.convolve(out, one)
    return out


def exact_epsilon(moved: Sequence[int], deviation: int, summands: int, delta: float) -> float:
    """Of a sum of vectors that one client moves by `moved`, whose entries have independent noise."""
    mass = masses(deviation, summands)
    wide = int(6.5 * math.sqrt(summands) * deviation) + 6  # what is beyond is added to delta
    middle = len(mass) // 2
    p, q = np.ones(1), np.ones(1)
    for by in moved:
        at = np.arange(middle - wide, middle + wide + 1)
        at = at[(at >= 0) & (at < len(mass)) & (at - by >= 0) & (at - by < len(mass))]
        p, q = np.outer(p, mass[at]).ravel(), np.outer(q, mass[at - by]).ravel()
    low, high = 0.0, 60.0
    for _ in range(40):
        middle_epsilon = (low + high) / 2
        above = np.maximum(p - math.exp(middle_epsilon) * q, 0).sum() + (1 - p.sum())
        low, high = (middle_epsilon, high) if above > delta else (low, middle_epsilon)
    return high


def accounted(moved: Sequence[int], deviation: int, summands: int, delta: float) -> float:
    rho = accounting.concentrated(math.hypot(*moved), deviation, summands, len(moved))
    return concentrated_epsilon(rho, delta)


@pytest.mark.parametrize("delta", [1e-2, 1e-5])
@pytest.mark.parametrize(("deviation", "summands"), [(1, 1), (1, 2), (1, 5), (2, 3), (3, 1), (4, 4)])
@pytest.mark.parametrize("moved", [(1,), (5,), (3, 4), (2, -2), (1, 1, 1), (4, 0, 3)])
def test_the_accounted_cost_is_no_less_than_the_exact_one(
    moved: tuple[int, ...], deviation: int, summands: int, delta: float
) -> None:
    exact, claimed = (of(moved, deviation, summands, delta) for of in (exact_epsilon, accounted))
    assert exact <= claimed
    if deviation >= 2:  # and where it is no Gaussian by far, the bound is not much above it either
        assert claimed < 1.35 * exact + 0.3


def test_a_gaussian_of_that_length_would_claim_too_little() -> None:
    exact = exact_epsilon((1,), 1, 1, 1e-5)
    assert gaussian_epsilon(1.0, 1, 1e-5) < 0.99 * exact
    assert exact < accounted((1,), 1, 1, 1e-5)
    # Of fine noise it would be right, but that is proved for no number of summands and dimensions.
    assert gaussian_epsilon(0.8, 1, 1e-5) == pytest.approx(exact_epsilon((25,), 10, 4, 1e-5), rel=1e-3)


def test_one_summand_is_what_dp_accounting_says() -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    for deviation, moved in ((1, 1), (2, 3), (5, 4)):
        theirs = pld.from_discrete_gaussian_mechanism(deviation, moved, value_discretization_interval=1e-4)
        exact = exact_epsilon((moved,), deviation, 1, 1e-5)
        assert exact - 1e-6 <= theirs.get_epsilon_for_delta(1e-5) <= exact + 2e-3
        # Rounds are further dimensions.
        twice = theirs.self_compose(2).get_epsilon_for_delta(1e-5)
        assert exact_epsilon((moved, moved), deviation, 1, 1e-5) == pytest.approx(twice, abs=2e-3)
        rho = accounting.concentrated(moved, deviation, 1, 1)
        assert twice <= compose([Release((2 * rho) ** -0.5, 1.0, 2, concentrated=True)], 1e-5)


def test_every_vector_that_a_client_may_send_costs_at_most_what_is_claimed() -> None:
    noisy = Noisy(FixedPoint(0.5, 1000, 32, 1.0), 1.0, 2, 2, 2)
    claimed, longest = concentrated_epsilon(noisy.rho, 1e-3), int(noisy.norm)
    sent = [
        moved
        for moved in itertools.product(range(-longest, longest + 1), repeat=2)
        if 0 < math.hypot(*moved) <= noisy.norm
    ]
    costs = [exact_epsilon(moved, noisy.deviation, noisy.fewest, 1e-3) for moved in sent]
    assert len(sent) > 10
    assert 0.7 * claimed < max(costs) <= claimed


def test_concentration_by_hand() -> None:
    # A Gaussian of multiplier 1 is 1/2-concentrated: at delta 1e-5 its exact epsilon is 4.38, this bound a little more.
    assert accounting.concentrated(1000.0, 1000, 1, 10) == 0.5
    assert 4.377 < concentrated_epsilon(0.5, 1e-5) < 4.8
    assert accounting.concentrated(1000.0, 1000, 4, 10) == pytest.approx(0.125)
    tau = 10 * (math.exp(-(math.pi**2)) + math.exp(-4 * math.pi**2 / 3))  # deviation 1, three summands
    assert accounting.concentrated(3.0, 1, 3, 16) == pytest.approx((3 / math.sqrt(3) + 4 * tau) ** 2 / 2)
    assert accounting.concentrated(1.0, 0, 5, 3) == math.inf == concentrated_epsilon(math.inf, 1e-5)
    assert concentrated_epsilon(0.0, 1e-5) == 0.0
    with pytest.raises(ConfigError, match="have no epsilon"):
        concentrated_epsilon(0.5, 0.0)


def test_concentrated_releases_add_up_and_are_not_sampled() -> None:
    two = Release(2.0, 1.0, 3, concentrated=True)
    assert compose([two], 1e-5) == concentrated_epsilon(3 / 8, 1e-5) > compose([Release(2.0, 1.0, 3)], 1e-5)
    assert compose([two, Release(1.0, 1.0)], 1e-5) == concentrated_epsilon(3 / 8 + 1 / 2, 1e-5)
    with pytest.raises(ConfigError, match="claim no sampling"):
        Release(2.0, 0.5, concentrated=True)
    with pytest.raises(ConfigError, match="does not add up with sampled releases"):
        compose([two, Release(1.0, 0.5)], 1e-5)
