"""Lower bounds of epsilon: their ceilings, their coverage on an ideal mechanism, and how they move."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedssl.errors import ConfigError
from fedssl.privacy.audit import bounds, roc
from fedssl.privacy.audit.clients import client_canary_estimate, directions, normal_epsilon
from fedssl.privacy.release import gaussian_epsilon


@pytest.mark.parametrize(
    ("n", "ceiling"), [(50, 2.57), (100, 3.28), (200, 3.98), (500, 4.91), (1000, 5.60), (5000, 7.21)]
)
def test_what_a_perfect_attack_can_show_in_repeated_runs(n: int, ceiling: float) -> None:
    assert bounds.epsilon_lower_bound(n, n, 0, n) == pytest.approx(ceiling, abs=0.005)
    assert bounds.epsilon_lower_bound(0, n, n, n) == 0.0  # a test that is always wrong is another test


@pytest.mark.parametrize(
    ("r", "ceiling"), [(10, 1.05), (30, 2.25), (100, 3.49), (300, 4.60), (1000, 5.81), (10_000, 8.11)]
)
def test_what_a_perfect_attack_can_show_in_one_run(r: int, ceiling: float) -> None:
    found = bounds.one_run_lower_bound(r, r, r)
    assert found == pytest.approx(ceiling, abs=0.01)
    assert found == pytest.approx(-math.log(0.05 ** (-1 / r) - 1), abs=1e-5)  # q^r = 0.05 solved for epsilon


def test_delta_lowers_the_bound() -> None:
    assert bounds.one_run_lower_bound(10_000, 10_000, 10_000, delta=1e-5) == pytest.approx(7.83, abs=0.01)
    assert bounds.epsilon_lower_bound(90, 100, 5, 100, delta=0.1) < bounds.epsilon_lower_bound(90, 100, 5, 100)


def test_the_p_value_is_the_sum_it_is_written_as() -> None:
    epsilon, delta, r, v, m = 0.7, 0.003, 12, 9, 20
    q = math.exp(epsilon) / (1 + math.exp(epsilon))

    def mass(k: int) -> float:
        return math.comb(r, k) * q**k * (1 - q) ** (r - k)

    largest = max(sum(mass(k) for k in range(v - i, v)) / i for i in range(1, v + 1))
    expected = sum(mass(k) for k in range(v, r + 1)) + 2 * m * delta * largest
    assert bounds.one_run_p_value(v, r, m, epsilon, delta) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_more_right_answers_never_lower_a_bound(positives: int, negatives: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, positives - 1))
    alarms = data.draw(st.integers(0, negatives - 1))
    tpr, fpr = bounds.rates(hits, positives, alarms, negatives)
    assert bounds.rates(hits + 1, positives, alarms, negatives)[0] >= tpr
    assert bounds.rates(hits, positives, alarms + 1, negatives)[1] >= fpr
    assert bounds.one_run_lower_bound(hits + 1, positives, 60) >= bounds.one_run_lower_bound(hits, positives, 60)
    wide = bounds.one_run_lower_bound(hits, positives, 60, confidence=0.99)
    assert wide <= bounds.one_run_lower_bound(hits, positives, 60, confidence=0.9)


def test_replaced_records_say_half_as_much_about_added_ones() -> None:
    added = bounds.one_run_lower_bound(95, 100, 100)
    assert bounds.one_run_lower_bound(95, 100, 100, replaced=True) == pytest.approx(added / 2, abs=1e-4)


@pytest.mark.parametrize("bound", [bounds.epsilon_lower_bound, bounds.gdp_lower_bound])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_repeated_runs_cover_at_the_stated_rate(bound: object, mu: float) -> None:
    """On an ideal Gaussian mechanism the bound is above the truth in at most a share 1 - confidence of the audits."""
    rng = np.random.default_rng(3)
    delta, truth = 1e-3, gaussian_epsilon(1 / mu, 1, 1e-3)
    found = np.array(
        [
            bounds.split_bound(
                rng.normal(mu, 1, 300),
                rng.normal(0, 1, 300),
                delta=delta,
                confidence=0.8,
                bound=bound,  # type: ignore[arg-type]
            )
            for _ in range(40)
        ]
    )
    assert (found > truth).mean() <= 0.2 + 2 * math.sqrt(0.16 / 40)
    assert np.median(found) > 0.1 * truth  # and it is no empty statement


def test_one_run_covers_and_finds_something() -> None:
    rng = np.random.default_rng(4)
    mu, delta = 2.0, 1e-5
    truth = gaussian_epsilon(1 / mu, 1, delta)
    found = []
    for _ in range(40):
        coins = rng.random(1000) < 0.5
        found.append(bounds.guess_bound(rng.normal(mu * coins, 1), coins, delta=delta, confidence=0.8))
    assert (np.array(found) > truth).mean() <= 0.2 + 2 * math.sqrt(0.16 / 40)
    assert np.mean(found) == pytest.approx(3.4, abs=0.4)


def test_one_run_says_nothing_of_noise() -> None:
    rng = np.random.default_rng(5)
    found = [bounds.guess_bound(rng.normal(0, 1, 300), rng.random(300) < 0.5, confidence=0.8) for _ in range(60)]
    assert np.mean(np.array(found) > 0) <= 0.2 + 2 * math.sqrt(0.16 / 60)


def test_gdp_needs_fewer_runs() -> None:
    hits, runs, alarms = 160, 1000, 2
    exact = bounds.epsilon_lower_bound(hits, runs, alarms, runs, delta=1e-5)
    assert bounds.gdp_lower_bound(hits, runs, alarms, runs, delta=1e-5) > exact
    assert bounds.gdp_lower_bound(50, 100, 50, 100, delta=1e-5) == 0.0


def test_normal_epsilon_is_that_of_the_gaussian_mechanism() -> None:
    for mu in (0.3, 1.0, 2.0):
        assert normal_epsilon((0, 1), (mu, 1), 1e-5) == pytest.approx(gaussian_epsilon(1 / mu, 1, 1e-5), rel=1e-6)
    assert normal_epsilon((0, 1), (0, 1), 1e-5) == 0.0


def test_normal_epsilon_of_unequal_deviations_by_integration() -> None:
    x = np.linspace(-30, 30, 600_001)
    p, q = (np.exp(-((x - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi)) for m, s in ((0, 1), (1.5, 0.8)))
    epsilon = normal_epsilon((0, 1), (1.5, 0.8), 1e-3)
    deltas = [np.maximum(a - math.exp(epsilon) * b, 0).sum() * (x[1] - x[0]) for a, b in ((p, q), (q, p))]
    assert max(deltas) == pytest.approx(1e-3, rel=1e-4)


def test_client_canaries_estimate_the_noise_that_was_added() -> None:
    """A toy federation: 200 canary clients of norm C among others, one noisy sum; the truth is one Gaussian."""
    rng, dim, clients, sigma = np.random.default_rng(6), 20_000, 200, 1.5
    canaries = directions(clients, dim, seed=0)
    others = directions(100, dim, seed=1)
    released = canaries.sum(0) + others.sum(0) + sigma * rng.standard_normal(dim)
    truth = gaussian_epsilon(sigma, 1, 1e-5)
    estimate = client_canary_estimate(released, canaries, delta=1e-5)
    assert 0.6 * truth < estimate < 1.4 * truth
    silent = client_canary_estimate(others.sum(0) + sigma * rng.standard_normal(dim), canaries, delta=1e-5)
    assert silent < 0.3 * truth
    twice = client_canary_estimate(2 * canaries.sum(0) + sigma * rng.standard_normal(dim), canaries, delta=1e-5)
    assert twice > 1.4 * truth


def test_the_curve_and_its_area_by_hand() -> None:
    members, others = np.array([3.0, 2.0, 2.0, 0.0]), np.array([2.0, 1.0])
    fpr, tpr = roc.curve(members, others)
    np.testing.assert_allclose(fpr, [0, 0, 0.5, 1, 1, 1])
    np.testing.assert_allclose(tpr, [0, 0.25, 0.75, 0.75, 1, 1])
    by_pairs = np.mean([(m > o) + 0.5 * (m == o) for m in members for o in others])
    assert roc.area(members, others, draws=0).value == pytest.approx(by_pairs)
    assert np.trapezoid(tpr, fpr) == pytest.approx(by_pairs)


def test_rates_at_few_false_alarms() -> None:
    others = np.arange(100.0)
    members = np.concatenate((np.full(5, 200.0), np.full(5, 98.5), np.full(90, -1.0)))
    assert roc.rate_at(members, others, 0.001).value == 0.05  # none of 100 may be alarmed
    at_one_percent = roc.rate_at(members, others, 0.01)  # one may
    assert at_one_percent.value == 0.10
    assert at_one_percent.low < 0.10 < at_one_percent.high


def test_the_interval_of_the_area_covers() -> None:
    rng = np.random.default_rng(7)
    truth = 0.5 * (1 + math.erf(0.5 / 2))  # P[N(0.5, 1) > N(0, 1)] = Phi(0.5 / sqrt 2)
    hits = 0
    for i in range(60):
        found = roc.area(rng.normal(0.5, 1, 120), rng.normal(0, 1, 120), draws=200, seed=i)
        hits += found.low <= truth <= found.high
    assert hits >= 60 * 0.95 - 2 * math.sqrt(60 * 0.05 * 0.95) - 1


def test_refusals() -> None:
    for call in (
        lambda: bounds.epsilon_lower_bound(5, 4, 0, 4),
        lambda: bounds.epsilon_lower_bound(1, 4, 0, 4, confidence=1.0),
        lambda: bounds.epsilon_lower_bound(1, 4, 0, 4, delta=1.0),
        lambda: bounds.one_run_lower_bound(5, 10, 8),
        lambda: bounds.split_bound(np.zeros(1), np.zeros(9)),
        lambda: bounds.split_bound(np.full(9, np.nan), np.zeros(9)),
        lambda: bounds.guess_bound(np.zeros(9), np.zeros(8, bool)),
        lambda: client_canary_estimate(np.zeros(3), np.zeros((2, 4)), delta=1e-5),
        lambda: normal_epsilon((0, 0), (0, 1), 0.1),
        lambda: roc.curve(np.zeros(0), np.zeros(3)),
    ):
        with pytest.raises(ConfigError):
            call()
