"""The audit finds every mechanism of the gallery of broken ones, and finds nothing against the sound ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from broken import rows, sums
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient
from fedssl.privacy.audit.bounds import gdp_lower_bound
from fedssl.privacy.audit.mechanism import Scores, dirac, one_run, repeated_runs, through
from fedssl.privacy.release import gaussian_epsilon

DELTA = 1e-5


def two_worlds(mechanism: sums.Mechanism, gradient: Tensor, direction: Tensor, runs: int) -> Scores:
    """Runs with a record of this gradient beside three others, and without it."""
    company = torch.randn(3, len(gradient), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    both = torch.cat((company, gradient[None]))
    return repeated_runs(lambda there, rng: mechanism(both if there else company, rng), direction, runs=runs, seed=0)


# Losses that couple the rows


def test_per_row_clipping_of_info_nce_is_found() -> None:
    present, absent = rows.clipped_sum(rows.rows_of_info_nce, n=16, bound=0.01)
    moved = (present - absent).norm() / 0.01
    assert 13 < moved < 31, "one record of 16 moves 14 others, and 2 (n - 1) + 1 is the most"
    scores = repeated_runs(rows.noisy(present, absent, 4 * 0.01), present - absent, runs=500, seed=0)
    claimed = gaussian_epsilon(4, 1, DELTA)
    assert claimed == pytest.approx(0.926, abs=0.01)
    assert scores.epsilon(delta=DELTA) > 2 * claimed


def test_pair_gradients_of_byol_hold() -> None:
    present, absent = rows.clipped_sum(rows.rows_of_byol, n=16, bound=0.01)
    assert (present - absent).norm() <= 0.01 * (1 + 1e-9)
    scores = repeated_runs(rows.noisy(present, absent, 4 * 0.01), present - absent, runs=500, seed=0)
    assert scores.epsilon(delta=DELTA) < gaussian_epsilon(4, 1, DELTA)


# Sums


def test_clipping_each_view_is_found() -> None:
    """A factor of two in the sensitivity, at delta = 0.01 where a thousand runs can tell."""
    noise, delta, gradient = 2.0, 0.01, 10 * dirac(1, 4, 1.0)[0]
    claimed = gaussian_epsilon(noise, 1, delta)
    broken = two_worlds(sums.per_view(noise, views=2), gradient, gradient, runs=4000)
    sound = two_worlds(sums.gaussian(noise), gradient, gradient, runs=4000)
    assert broken.epsilon(delta=delta) > claimed > sound.epsilon(delta=delta)
    assert broken.epsilon(delta=delta, bound=gdp_lower_bound) > claimed
    assert sound.epsilon(delta=delta, bound=gdp_lower_bound) < claimed


def test_an_accountant_that_is_reset_is_found() -> None:
    noise, rounds, gradient = 4.0, 50, dirac(1, 4, 1.0)[0]
    scores = two_worlds(sums.many_rounds(sums.gaussian(noise), rounds), gradient, gradient, runs=400)
    one_round, whole = (gaussian_epsilon(noise, releases, DELTA) for releases in (1, rounds))
    assert one_round < scores.epsilon(delta=DELTA) < whole


@pytest.mark.parametrize("mechanism", [sums.shared_noise, sums.twin_clients])
def test_noise_that_is_drawn_twice_is_found(mechanism: object) -> None:
    noise, half = 4.0, 3
    unit = torch.zeros(2 * half, dtype=torch.float64)
    unit[0] = 1
    # What one tensor or client has, the other shows without its noise.
    direction = unit - unit.roll(half) if mechanism is sums.shared_noise else torch.cat((unit, -unit))
    scores = two_worlds(mechanism(noise), unit, direction, runs=200)  # type: ignore[operator]
    assert scores.epsilon(delta=DELTA) > gaussian_epsilon(noise, 1, DELTA)


def test_an_unclipped_scalar_is_found() -> None:
    gradient = torch.tensor([0.0, 0.0, 0.0, 100.0], dtype=torch.float64)
    scores = two_worlds(sums.unclipped_scalar(4.0), gradient, gradient, runs=200)
    assert scores.epsilon(delta=DELTA) > gaussian_epsilon(4, 1, DELTA)
    assert two_worlds(sums.gaussian(4.0), gradient, gradient, 200).epsilon(delta=DELTA) < 0.93


# One run


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_one_run_of_a_sound_mechanism_stays_below(noise: float) -> None:
    found = one_run(sums.gaussian(noise), canaries=1000, length=10.0, seed=0, delta=DELTA)
    assert found < gaussian_epsilon(noise, 1, DELTA)
    if noise <= 0.5:
        assert found > 1, "the audit is not blind"


def test_one_run_over_many_sampled_steps_stays_below() -> None:
    found = one_run(sums.sampled(1.0, 0.1), canaries=500, length=10.0, seed=0, delta=DELTA, steps=40)
    assert found < gaussian_epsilon(1.0, 40, DELTA)


def test_one_run_finds_gross_errors() -> None:
    claimed = gaussian_epsilon(4, 1, DELTA)
    found = one_run(sums.per_view(4.0, views=16), canaries=1000, length=100.0, seed=0, delta=DELTA)
    assert found > claimed
    reset = one_run(sums.many_rounds(sums.gaussian(4.0), 100), canaries=1000, length=10.0, seed=0, delta=DELTA)
    assert reset > claimed


def test_canaries_have_company() -> None:
    company = torch.randn(20, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    company[:, :50] = 0  # on axes of their own
    found = one_run(sums.gaussian(1e-6), canaries=50, length=10.0, seed=0, company=company)
    assert found == pytest.approx(-math.log((0.05 / 4) ** (-1 / 40) - 1), abs=1e-4), "no noise, all guesses right"
    with pytest.raises(ConfigError, match="no axis"):
        dirac(5, 4, 1.0)


# The code that trains


def test_gradients_go_through_the_transform_that_trains() -> None:
    """Without privacy the sum of the batches' means comes out, and the audit says that there is none."""
    given = torch.randn(12, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    plain = through(PlainGradient(), batch_size=4, epochs=2)
    torch.testing.assert_close(plain(given, np.random.default_rng(0)), 2 * given.sum(0) / 4)
    assert one_run(through(PlainGradient(), batch_size=64), canaries=200, length=1.0, seed=0) > 3
