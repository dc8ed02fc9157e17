"""Canary clients find broken aggregations, and nothing against those that a run uses."""

from __future__ import annotations

from typing import Any

import pytest
from broken import clients

from fedssl.aggregation.base import Planned
from fedssl.aggregation.spending import planned
from fedssl.participation.cohorts import Cohorts
from fedssl.participation.synchronous import Synchronous
from fedssl.privacy.audit.bounds import gdp_lower_bound
from fedssl.privacy.audit.federation import Federation
from fedssl.privacy.clients import client_dp
from fedssl.privacy.clients.client_dp import ClientDP
from fedssl.privacy.clients.ftrl import FTRL
from fedssl.privacy.clients.local_dp import LocalDP
from fedssl.privacy.clients.secure import Secure
from fedssl.privacy.clients.secure_dp import SecureDP
from fedssl.privacy.release import gaussian_epsilon

DELTA = 1e-3
UNIFORM, POISSON = (Planned(8, 6, 0, Synchronous(0.5, draw)) for draw in ("uniform", "poisson"))
COHORTS = Planned(8, 8, 0, Cohorts(4))


def federation(dp: Any, plan: Planned) -> Federation:
    found = Federation.of(dp, plan, plan.rounds)
    assert found is not None
    return found


def bound(dp: Any, plan: Planned, runs: int = 250, **options: Any) -> float:
    return federation(dp, plan).two_worlds(runs=runs, seed=0).epsilon(delta=DELTA, **options)


def claim(dp: Any, plan: Planned) -> float:
    return planned(dp, plan).epsilon(DELTA)


@pytest.mark.parametrize(
    ("dp", "plan", "least"),
    [
        (ClientDP(delta=DELTA), COHORTS, 0.3),
        (ClientDP(delta=DELTA), UNIFORM, 0.5),
        (ClientDP(delta=DELTA), POISSON, 0.1),
        (ClientDP(delta=DELTA, quantile=0.5, bit_noise=2.0), COHORTS, 0.3),
        (ClientDP(delta=DELTA, noise_multiplier=None, target_epsilon=4.0), UNIFORM, 0.3),
        (FTRL(delta=DELTA), COHORTS, 0.2),
        (LocalDP(delta=DELTA), COHORTS, 0.5),
        (SecureDP(delta=DELTA), Planned(3, 2, 0, Synchronous()), 0.0),
    ],
)
def test_aggregations_hold_what_they_claim(dp: Any, plan: Planned, least: float) -> None:
    runs = 60 if isinstance(dp, SecureDP) else 250
    found = federation(dp, plan).two_worlds(runs=runs, seed=0)
    assert least <= found.epsilon(delta=DELTA) < claim(dp, plan)
    shift = (found.present.mean() - found.absent.mean()) / found.absent.std()
    assert shift > 0.3, "the audit is not blind"


def test_the_noise_of_a_wrong_divisor_is_found() -> None:
    broken = clients.OtherDivisor(delta=DELTA, noise_multiplier=4.0)
    assert bound(broken, COHORTS) > claim(broken, COHORTS)


def test_an_unclipped_scalar_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    dp = ClientDP(delta=DELTA, noise_multiplier=4.0)
    assert bound(dp, COHORTS) < claim(dp, COHORTS)
    monkeypatch.setattr(client_dp, "clip", clients.clip_all_but_scalars)
    assert bound(dp, COHORTS) > 2 * claim(dp, COHORTS)


def test_banded_noise_for_one_turn_is_found() -> None:
    plan = Planned(8, 16, 0, Cohorts(4))
    sound, broken = (kind(delta=DELTA, noise_multiplier=2.0) for kind in (FTRL, clients.OneTurn))
    found = [bound(dp, plan, bound=gdp_lower_bound) for dp in (sound, broken)]
    assert found[0] < claim(sound, plan) < found[1]


def test_local_noise_for_one_clip_norm_is_found() -> None:
    """A factor of two, by the bound that assumes a Gaussian, as it is."""
    sound, broken = (kind(delta=DELTA, target_epsilon=3.0) for kind in (LocalDP, clients.OneBound))
    found = [bound(dp, COHORTS, bound=gdp_lower_bound) for dp in (sound, broken)]
    assert found[0] < claim(sound, COHORTS) < found[1]


def test_the_estimate_is_near_the_claim_of_who_sees_the_model() -> None:
    dp = ClientDP(delta=DELTA)
    always = Planned(8, 4, 0, Synchronous())
    assert federation(dp, always).estimate(seed=0, delta=DELTA) == pytest.approx(claim(dp, always), rel=0.2)
    # Cohorts come twice in eight rounds, and the sum has the noise of all of them.
    found = federation(dp, COHORTS).estimate(seed=0, delta=DELTA)
    assert found == pytest.approx(gaussian_epsilon(8**0.5 / 2, 1, DELTA), rel=0.3)
    assert Federation.of(Secure(), UNIFORM, 6) is None
    assert federation(SecureDP(), UNIFORM).estimate(seed=0, delta=DELTA) is None
    assert federation(dp, Planned(8, 2, 0, Synchronous(1e-9, "poisson"))).estimate(seed=0, delta=DELTA) is None
