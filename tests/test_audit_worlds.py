"""Audits by repeated steps find broken mechanisms for records that meet, and nothing against those that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from broken import coupled

from fedssl.method import SSLMethod
from fedssl.methods.sigmoid import SigmoidPairs
from fedssl.methods.simclr import SimCLR
from fedssl.privacy.accountant import epsilon
from fedssl.privacy.audit.bounds import gdp_lower_bound
from fedssl.privacy.audit.mechanism import Scores, repeated_runs
from fedssl.privacy.audit.worlds import Worlds, worlds
from fedssl.privacy.coupled.group_dp import GroupDP
from fedssl.privacy.coupled.pair_dp import PairDP
from fedssl.privacy.coupled.pair_rules import NTXentPairs, SigmoidRule
from fedssl.privacy.coupled.statistics_dp import StatisticsDP
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.record_dp import RecordDP

DELTA, NOISE, N = 0.01, 2.0, 32
SIMCLR = SimCLR(temperature=1.0, norm="group")
OPTIONS: dict[str, Any] = {"epsilon": None, "noise_multiplier": NOISE, "delta": DELTA, "sample_rate": 1.0}


def two(mechanism: RecordDP, method: SSLMethod = SIMCLR, rounds: int = 1) -> Worlds:
    found = worlds(mechanism.planned(N, N, 1, rounds), method)
    assert found is not None
    return found


def scores(mechanism: RecordDP, runs: int, method: SSLMethod = SIMCLR, rounds: int = 1) -> Scores:
    found = two(mechanism, method, rounds)
    release = found.release(batch_size=N, epochs=1, rounds=[None] * rounds)
    return repeated_runs(release, found.direction(release), runs=runs, seed=0)


def bound(mechanism: RecordDP, runs: int, method: SSLMethod = SIMCLR, rounds: int = 1) -> float:
    return scores(mechanism, runs, method, rounds).epsilon(delta=DELTA)


def gaussian(mechanism: RecordDP, runs: int) -> float:
    """The bound that assumes a Gaussian, which a step of all records is: so few runs show a factor of two."""
    return scores(mechanism, runs).epsilon(delta=DELTA, bound=gdp_lower_bound)


CLAIM = epsilon(NOISE, 1.0, 1, DELTA)


def test_a_statistic_with_a_quarter_of_its_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = StatisticsDP(**OPTIONS, statistic_share=0.9, engine="loop")
    assert bound(mechanism, 400) < CLAIM
    coupled.quieten_the_statistic(monkeypatch)
    assert bound(mechanism, 400) > CLAIM


def test_groups_whose_rows_are_clipped_are_found() -> None:
    assert bound(GroupDP(**OPTIONS, size=4), 300) < CLAIM < bound(coupled.PerRow(**OPTIONS, size=4), 300)


def test_labels_with_the_noise_of_slots_are_found() -> None:
    options = {**OPTIONS, "scheme": "labels", "size": 8, "engine": "loop"}
    assert gaussian(GroupDP(**options), 400) < CLAIM < gaussian(coupled.OneBound(**options), 400)


def test_pairs_that_forget_what_others_lose_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = PairDP(**OPTIONS)
    assert bound(mechanism, 150) < CLAIM
    coupled.forget_the_others_weights(monkeypatch)
    assert bound(mechanism, 150) > CLAIM


def test_many_rounds_of_a_reset_accountant_are_found() -> None:
    found = bound(StatisticsDP(**OPTIONS, statistic_share=0.5, memory=0.9, engine="loop"), 100, rounds=16)
    assert CLAIM < found < epsilon(NOISE, 1.0, 16, DELTA)


@pytest.mark.parametrize(
    ("mechanism", "method", "least", "most"),
    [
        (GroupDP(**OPTIONS, size=4, clip_norm=0.3), SIMCLR, 0.3, 0.3),
        (GroupDP(**OPTIONS, size=4, clip_norm=0.3, scheme="labels"), SIMCLR, 0.59, 0.6),
        (PairDP(**OPTIONS, clip_norm=2.0), SIMCLR, 1.2 * 5.09, 2 * NTXentPairs().sensitivity(1.0)),
        (PairDP(**OPTIONS), SimCLR(norm="group"), 0.25 * 24, NTXentPairs().sensitivity(0.5)),
        (PairDP(**OPTIONS), SigmoidPairs(norm="group"), 0.6 * 20, SigmoidRule().sensitivity(0.2)),
    ],
)
def test_the_record_moves_the_sum_about_as_far_as_it_may(
    mechanism: RecordDP, method: SSLMethod, least: float, most: float
) -> None:
    """Nearly the sensitivity for groups, a good part of it for pairs: an audit is as strong as its worst case."""
    found, scale = two(mechanism, method), N / (mechanism.size if isinstance(mechanism, GroupDP) else 1)
    moved = float(found.moved.abs()) * scale
    assert least * (1 - 1e-9) <= moved <= most * (1 + 1e-9)


def test_both_parts_of_a_statistic_are_read_and_only_coupled_mechanisms_need_worlds() -> None:
    found = two(StatisticsDP(**OPTIONS, statistic_share=0.2, clip_norm=0.5, statistic_norm=4.0))
    assert (found.moved * N).tolist() == [pytest.approx(0.5), pytest.approx(4.0)]
    assert worlds(ExampleDP(**OPTIONS).planned(N, N, 1, 1), SIMCLR) is None


@pytest.mark.parametrize("make", [lambda **o: GroupDP(size=4, **o), StatisticsDP, PairDP])
def test_sampled_steps_include_empty_ones(make: Callable[..., RecordDP]) -> None:
    found = worlds(make(**{**OPTIONS, "sample_rate": 0.05}).planned(N, 2, 1, 1), SIMCLR)
    assert found is not None
    out = found.release(batch_size=2, epochs=1, rounds=[5])(True, np.random.default_rng(0))
    assert torch.isfinite(out).all()
    assert found.moved.abs().min() > 0
