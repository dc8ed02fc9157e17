"""The audit finds every mechanism of the gallery of broken ones, and finds nothing against the sound ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from broken import rows, sums
from torch import Tensor

from fedssl.errors import ConfigError, PrivacyError
from fedssl.gradient import PlainGradient
from fedssl.methods.simclr import SimCLR
from fedssl.privacy.accountant import epsilon
from fedssl.privacy.audit.bounds import gdp_lower_bound
from fedssl.privacy.audit.mechanism import Scores, dirac, one_run, repeated_runs, through
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.record_dp import Planned
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


def private(noise: float, rounds: int, n: int) -> Planned:
    """DP-SGD as a client trains by it, one step a round, a tenth of the records in each."""
    mechanism = ExampleDP(epsilon=None, noise_multiplier=noise, sample_rate=0.1, clip_norm=0.5, micro_batch=64)
    return mechanism.planned(n, n // 10, 1, rounds)


def test_the_dp_sgd_that_trains_holds_what_it_claims() -> None:
    planned = private(noise=0.7, rounds=1, n=300)
    whole = through(planned, batch_size=30)  # an epoch: ten steps
    claimed = epsilon(0.7, 0.1, 10, DELTA)
    found = one_run(whole, canaries=300, length=100.0, seed=0, delta=DELTA, repeats=5)
    assert 0.3 < found < claimed


def test_dp_sgd_with_a_reset_accountant_is_found() -> None:
    planned = private(noise=1.5, rounds=30, n=200)
    one_epoch, all_epochs = (epsilon(1.5, 0.1, 10 * epochs, DELTA) for epochs in (1, 30))
    mechanism = through(planned, batch_size=20)
    found = one_run(mechanism, canaries=200, length=100.0, seed=0, delta=DELTA, steps=30, repeats=5)
    assert one_epoch < found < all_epochs


class Louder(ExampleDP):
    """Broken: contributions are clipped to eight times the norm that the noise is for."""

    def noisy_sum(self, *arguments: Any) -> Any:
        method, model, batch, step, planned, noise = arguments
        quiet = replace(planned, noise_multiplier=planned.noise_multiplier / 8)
        return ExampleDP.noisy_sum(
            replace(self, clip_norm=8 * self.clip_norm), method, model, batch, step, quiet, noise
        )


def test_dp_sgd_that_clips_to_another_norm_is_found() -> None:
    sound = ExampleDP(epsilon=None, noise_multiplier=2.0, sample_rate=1.0)
    broken = Louder(epsilon=None, noise_multiplier=2.0, sample_rate=1.0)
    claimed = epsilon(2.0, 1.0, 1, DELTA)
    bounds = [
        one_run(
            through(each.planned(250, 250, 1, 1), batch_size=250),
            canaries=250, length=100.0, seed=0, delta=DELTA, repeats=2,
        )
        for each in (sound, broken)
    ]  # fmt: skip
    assert bounds[0] < claimed < bounds[1]


def test_info_nce_is_refused_where_the_audit_finds_it() -> None:
    """What per-row clipping gets wrong, the project's own DP-SGD does not begin."""
    with pytest.raises(PrivacyError):
        ExampleDP().check(SimCLR())
