"""Banded noise: its sensitivity by enumeration, its memory, and what it is worth."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from conftest import assert_same

from fedssl.aggregation.base import Memory, Occasion, Planned
from fedssl.aggregation.noise import Noise
from fedssl.errors import ConfigError, PrivacyError
from fedssl.participation.cohorts import Cohorts
from fedssl.participation.synchronous import Synchronous
from fedssl.privacy.clients import banded
from fedssl.privacy.clients.client_dp import ClientDP
from fedssl.privacy.clients.ftrl import FTRL
from fedssl.privacy.release import gaussian_epsilon


def patterns(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """All sets of turns of one client that are far enough apart."""
    return [
        turns
        for size in range(1, rounds + 1)
        for turns in combinations(range(rounds), size)
        if all(b - a >= separation for a, b in pairwise(turns))
    ]


@pytest.mark.parametrize("rounds", range(1, 9))
@pytest.mark.parametrize("band", [1, 2, 3, 4])
def test_the_sensitivity_is_that_of_the_worst_pattern(rounds: int, band: int) -> None:
    coefficients = banded.square_root(band)
    matrix = banded.columns(coefficients, rounds)
    rng = np.random.default_rng(0)
    for separation in range(band, 9):
        worst = 0.0
        for turns in patterns(rounds, separation):
            gram = matrix[:, turns].T @ matrix[:, turns]
            worst = max(worst, float(np.sqrt(np.abs(gram).sum())))  # the worst updates of norm 1 point the same way
            some = rng.normal(size=(len(turns), 5))
            some /= np.linalg.norm(some, axis=1, keepdims=True)
            assert np.linalg.norm(matrix[:, turns] @ some) <= worst + 1e-9
        assert banded.sensitivity(coefficients, rounds, separation) == pytest.approx(worst, rel=1e-12)


def test_a_separation_below_the_band_would_not_be_covered() -> None:
    coefficients = banded.square_root(4)
    matrix = banded.columns(coefficients, 8)
    close = matrix[:, [0, 1]].sum(1)
    assert np.linalg.norm(close) > np.sqrt(2) * np.linalg.norm(coefficients)


@pytest.mark.parametrize(
    ("options", "participation", "words"),
    [
        ({}, Cohorts(3), r"participation.groups=4 or more, or aggregation.band=3"),
        ({}, Synchronous(0.1, "poisson"), r"participation=cohorts"),
        ({}, Synchronous(), r"after 1 rounds"),
    ],
)
def test_participation_without_waiting_is_refused(options: dict[str, int], participation: object, words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        FTRL(**options).admit(Planned(1000, 10, 0, participation))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="band=0"):
        FTRL(band=0)


def run(
    dp: FTRL, rounds: int, plan: Planned, memory: Memory | None = None, first: int = 1
) -> tuple[np.ndarray, Memory]:
    """(rounds, size) the changes of rounds without clients, and what is remembered at the end."""
    memory, out = memory or dp.begin(plan), []
    for at in range(first, first + rounds):
        session = dp.open({"encoder.w": np.zeros(3)}, Occasion(at, 1, []), memory, plan, lambda questions: {})
        found = session.finish()
        memory = found.memory
        out.append(found.change["encoder.w"])
    return np.stack(out), memory


def fresh(plan: Planned) -> np.ndarray:
    return np.stack([Noise(plan.seed).normal((3,), at, 1, "encoder.w") for at in range(1, plan.rounds + 1)])


@pytest.mark.parametrize("band", [1, 2, 4])
def test_the_stream_is_the_inverse_of_the_matrix_times_fresh_noise(band: int) -> None:
    plan, dp = Planned(1000, 10, 5, Cohorts(4)), FTRL(band=band, clip=0.3, noise_multiplier=2.0)
    change, memory = run(dp, 10, plan)
    matrix = banded.columns(banded.square_root(band), 10)
    spread = 2.0 * 0.3 * dp.sensitivity(plan) / 250
    np.testing.assert_allclose(change, spread * np.linalg.solve(matrix, fresh(plan)), atol=1e-12)
    assert len(memory.arrays) == band - 1  # models of noise, whatever the number of rounds
    before, kept = run(dp, 6, plan)
    after, _ = run(dp, 4, plan, kept, 7)
    assert_same({"all": change}, {"all": np.concatenate([before, after])})


def test_band_one_is_independent_noise() -> None:
    plan = Planned(1000, 10, 5, Cohorts(4))
    change, _ = run(FTRL(band=1), 10, plan)
    turns = np.sqrt(3)  # rounds 1, 5 and 9
    np.testing.assert_allclose(change, turns * fresh(plan) / 250)
    # The same guarantee as three independent releases to one client.
    multiplier = FTRL(band=1, noise_multiplier=None, target_epsilon=2.0).multiplier(plan)
    same = ClientDP(noise_multiplier=None, target_epsilon=2.0).multiplier(plan)
    assert multiplier * turns == pytest.approx(same, rel=1e-9)


@pytest.mark.parametrize(("rounds", "groups"), [(16, 4), (64, 8), (100, 10)])
def test_sums_of_rounds_have_less_noise(rounds: int, groups: int) -> None:
    errors = []
    for band in (1, 2, groups):
        coefficients = banded.square_root(band)
        spread = banded.sensitivity(coefficients, rounds, groups)
        prefix = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(banded.columns(coefficients, rounds))
        errors.append(spread * float(np.sqrt(np.square(prefix).sum(1).mean())))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.85 * errors[0]


def test_the_run_is_one_release_and_a_repeated_round_one_more() -> None:
    plan, dp = Planned(1000, 12, 0, Cohorts(4)), FTRL(noise_multiplier=1.5)
    assert [dp.entry(plan, at, 1).count for at in range(1, 4)] == [1, 0, 0]
    again = dp.entry(plan, 5, 2)
    # By enumeration: C with row 5 once more moves no further than both releases together say.
    matrix = banded.columns(banded.square_root(4), 12)
    doubled = np.vstack([matrix, matrix[4]])
    worst = max(np.sqrt(np.abs(doubled[:, p].T @ doubled[:, p]).sum()) for p in patterns(12, 4))
    together = (1.5**-2 + again.noise_multiplier**-2) ** -0.5
    assert worst / (1.5 * dp.sensitivity(plan)) <= 1 / together + 1e-12
    assert gaussian_epsilon(together, 1, 1e-5) > gaussian_epsilon(1.5, 1, 1e-5)
