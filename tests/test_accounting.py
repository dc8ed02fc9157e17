"""Epsilon against tables, a second accountant and formulas; a ledger that only grows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.errors import ConfigError, PrivacyError
from fedssl.privacy.accountant import Release, compose, curve, epsilon, joint, noise_multiplier, worst
from fedssl.privacy.ledger import Entry, Ledger

DELTA = 1e-5
TABLE = {  # (sample rate, noise, steps) -> RDP, PRV, PLD; opacus 1.6.0 and dp-accounting 0.6.0
    (0.01, 1.0, 1000): (2.1014, 1.8384, 1.8282),
    (0.005, 0.8, 4000): (3.2975, 2.8631, 2.8529),
    (0.1, 2.0, 500): (6.0343, 5.5658, 5.5555),
}
GAUSSIAN = (1.0, 1.9931)  # noise 20, 100 times, unsampled


@pytest.mark.parametrize("key", TABLE)
def test_three_accountants_agree_with_the_table_and_in_order(key: tuple[float, float, int]) -> None:
    rate, noise, steps = key
    found = [epsilon(noise, rate, steps, DELTA, name) for name in ("rdp", "prv", "pld")]
    assert found == pytest.approx(TABLE[key], abs=2e-3)
    assert found[0] > found[1] > found[2], "Renyi is looser, PRV's is the upper end of its error"


def test_fifty_rounds_cost_what_fifty_rounds_cost() -> None:
    one, all_of_them = (epsilon(1.5, 0.1, steps, DELTA) for steps in (50, 2500))
    assert (one, all_of_them) == pytest.approx((2.53, 22.3), abs=0.01), "printing one round's is the known mistake"


def test_replacing_one_record_is_twice_as_far_as_adding_one() -> None:
    assert epsilon(1.0, 1.0, 1, DELTA, relation="replace_one") == pytest.approx(9.997, abs=1e-3)
    assert epsilon(1.0, 1.0, 1, DELTA) == pytest.approx(4.377, abs=1e-3)
    with pytest.raises(ConfigError, match="relation=replace_one has no accountant"):
        epsilon(1.0, 0.1, 1, DELTA, relation="replace_one")


def test_releases_without_sampling_are_one_gaussian_for_every_accountant() -> None:
    for name in ("pld", "prv", "rdp"):
        assert epsilon(20.0, 1.0, 100, DELTA, name) == pytest.approx(GAUSSIAN[1], abs=1e-3)


def test_a_curve_is_epsilon_at_each_delta() -> None:
    for release in (Release(1.0, 0.1, 20), Release(2.0, 1.0, 3)):
        fine = [compose([release], delta) for delta in (1e-3, 1e-5)]
        assert curve(release, (1e-3, 1e-5)) == pytest.approx(fine, rel=0.01)
        assert all(a >= b - 1e-9 for a, b in zip(curve(release, (1e-3, 1e-5)), fine, strict=True)), "rounded up"


def test_two_releases_of_one_sample_are_not_two_samples() -> None:
    apart = compose([Release(2.0, 0.01, 1000), Release(2.0, 0.01, 1000)], DELTA)
    together = epsilon(joint(2.0, 2.0), 0.01, 1000, DELTA)
    assert joint(2.0, 2.0) == pytest.approx(math.sqrt(2))
    assert together > 1.05 * apart, "accounting for them apart claims too little"
    assert epsilon(joint(5.0, 1.0), 0.01, 1000, DELTA) == pytest.approx(1.906, abs=2e-3)
    assert joint(0.0, 1.0) == 0.0


@pytest.mark.parametrize(("target", "rate", "steps"), [(8.0, 0.05, 400), (1.0, 0.3, 100), (3.0, 1.0, 20)])
def test_the_noise_for_a_target_meets_it_and_not_by_much(target: float, rate: float, steps: int) -> None:
    found = epsilon(noise_multiplier(target, rate, steps, DELTA), rate, steps, DELTA)
    assert 0.97 * target <= found <= target


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: epsilon(1.0, 0.1, 1, DELTA, "gdp"), "gdp claims too little"),
        (lambda: epsilon(1.0, 0.1, 1, 0.0), "delta=0.0 is no probability"),
        (lambda: epsilon(1.0, 0.0, 1, DELTA), "are no release"),
        (lambda: epsilon(-1.0, 0.5, 1, DELTA), "are no release"),
        (lambda: epsilon(1.0, 0.5, 1, DELTA, relation="both"), "relation='both' is unknown"),
        (lambda: noise_multiplier(0.0, 0.5, 1, DELTA), "asks for no noise in particular"),
        (lambda: noise_multiplier(math.inf, 0.5, 1, DELTA), "asks for no noise in particular"),
        (lambda: noise_multiplier(1e-9, 1.0, 10**9, DELTA), "no noise brings"),
    ],
)
def test_what_has_no_epsilon_is_refused(call: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        call()  # type: ignore[operator]


def test_nothing_costs_nothing_and_no_noise_is_no_guarantee() -> None:
    assert (epsilon(1.0, 0.1, 0, DELTA), epsilon(0.0, 0.1, 1, DELTA)) == (0.0, math.inf)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.8, 5), st.floats(0.01, 1), st.integers(1, 300))
def test_more_steps_more_sampling_and_less_noise_cost_more(noise: float, rate: float, steps: int) -> None:
    here = epsilon(noise, rate, steps, DELTA, "rdp")
    assert epsilon(noise, rate, 2 * steps, DELTA, "rdp") >= here
    assert epsilon(1.1 * noise, rate, steps, DELTA, "rdp") <= here


def entry(at: int, count: int = 50, attempt: int = 1) -> Entry:
    return Entry(at, attempt, "gradients", 1.5, 0.1, count)


def test_a_ledger_adds_rounds_up_and_survives_text() -> None:
    ledger = Ledger()
    assert (ledger.epsilon(DELTA), ledger.text(), Ledger.read("")) == (0.0, "", ledger)
    for at in range(1, 51):
        ledger = ledger.spend(entry(at))
    assert ledger.epsilon(DELTA) == pytest.approx(22.3, abs=0.01)
    assert Ledger.read(ledger.text()) == ledger


def test_a_round_is_written_once_and_each_attempt_of_it() -> None:
    once = Ledger().spend(entry(1))
    assert once.spend(entry(1)) == once
    assert once.spend(entry(1, attempt=2)).epsilon(DELTA) > once.epsilon(DELTA)
    with pytest.raises(PrivacyError, match="spent cannot be changed"):
        once.spend(entry(1, count=1))


@pytest.mark.parametrize("harm", ["drop", "change", "swap", "tear"])
def test_a_ledger_that_was_changed_is_refused(harm: str) -> None:
    ledger = Ledger().spend(entry(1)).spend(entry(2)).spend(entry(3))
    lines = ledger.text().splitlines()
    broken = {
        "drop": lines[1:],
        "change": [line.replace('"count": 50', '"count": 5') for line in lines],
        "swap": [lines[1], lines[0], lines[2]],
        "tear": [*lines[:2], lines[2][:40]],
    }[harm]
    with pytest.raises(PrivacyError, match="privacy ledger is not what was written"):
        Ledger.read("\n".join(broken))


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 6), st.integers(1, 60))
def test_what_is_affordable_fits_and_one_more_does_not(budget: float, count: int) -> None:
    ledger, wanted = Ledger().spend(entry(1, 20)), entry(2, count)
    able = ledger.affordable(wanted, budget, DELTA)
    assert 0 <= able <= count
    spent = ledger.spend(entry(2, able)).epsilon(DELTA) if able else 0.0
    assert spent <= budget or not able
    if able < count:
        assert ledger.spend(entry(2, able + 1)).epsilon(DELTA) > budget


def test_clients_with_records_of_their_own_do_not_add_up() -> None:
    small, large = Release(1.5, 0.1, 5), Release(1.5, 0.1, 50)
    assert worst([small, large], DELTA) == large
    assert worst([], DELTA) is None
