"""Client-level privacy, central and local: what moves how far, how much noise, what it costs, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, assert_same, execute, final_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy.stats import chi2
from test_aggregation import resumed

from fedssl import config
from fedssl.aggregation.base import Occasion, Outcome, Planned, Sender
from fedssl.aggregation.claims import gaussian_multiplier
from fedssl.aggregation.noise import Noise
from fedssl.aggregation.sampling import sampling_of
from fedssl.aggregation.spending import planned
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError, ProtocolError
from fedssl.flower.aggregation.server import Aggregator
from fedssl.participation.buffered import Buffered
from fedssl.participation.cohorts import Cohorts
from fedssl.participation.synchronous import Synchronous
from fedssl.parts import Arrays
from fedssl.privacy.accountant import Release, compose
from fedssl.privacy.clients.client_dp import BELOW, ClientDP, adapted
from fedssl.privacy.clients.flat import clip, length
from fedssl.privacy.clients.local_dp import SPREAD, LocalDP
from fedssl.privacy.release import gaussian_epsilon

Compose = Callable[..., Plan]
POISSON = Planned(1000, 100, 0, Synchronous(0.1, "poisson"))


def model(value: float = 0.0, counter: int = 0, scale: float = 0.0) -> Arrays:
    """Weights, a 0-d parameter, an integer buffer, and an empty array."""
    return {
        "encoder.weight": np.full((3, 2), value),
        "encoder.scale": np.array(scale),
        "encoder.num_batches_tracked": np.array(counter),
        "encoder.empty": np.zeros((0, 4)),
    }


def outcome(dp: Any, updates: list[Arrays], plan: Planned = POISSON, at: int = 1, attempt: int = 1) -> Outcome:
    """What a round of these changes comes to, through both sides."""
    session = dp.open(model(), Occasion(at, attempt, range(len(updates))), dp.begin(plan), plan, lambda questions: {})
    for client, update in enumerate(updates):
        session.add(client, dp.send(update, session.told(client), Sender(client, at, attempt, 10, plan.seed)))
    found = session.finish()
    assert found is not None
    return found


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "normal", lambda self, shape, *path: np.zeros(shape))


# Clipping.


@pytest.mark.parametrize("moved", [{"scale": 100.0}, {"counter": 100}, {"value": 100.0}, {"value": 1e200}])
def test_everything_that_is_sent_is_clipped_together(moved: Mapping[str, Any]) -> None:
    # Flower 1.41 lets 0-d arrays through: a client could move one by 100 under a clip norm of 1.
    clipped, norm = clip(model(**moved), 1.0)
    assert norm >= 100
    assert 1 - 1e-6 <= length(clipped) <= 1
    assert clipped["encoder.scale"].shape == ()


def test_zero_and_odd_updates_are_zero() -> None:
    for update in (model(), {}):
        clipped, norm = clip(update, 1.0)
        assert norm == 0
        assert length(clipped) == 0
    for odd in (math.nan, math.inf):
        clipped, norm = clip(model(scale=odd), 1.0)
        assert math.isnan(norm)
        assert length(clipped) == 0


def test_an_update_that_is_not_finite_adds_nothing_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    without_noise(monkeypatch)
    dp = ClientDP(quantile=0.5, clip=1.0)
    found = outcome(dp, [model(0.1), model(math.nan), model(1e300) | {"encoder.scale": np.array(math.inf)}])
    alone = outcome(dp, [model(0.1)])
    assert found.row["not_finite"] == 2
    assert "not_finite" not in alone.row
    assert found.memory == alone.memory  # its bit is not counted either
    assert_same(found.change, alone.change)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.integers(-9, 9), st.floats(-1e3, 1e3)), min_size=1, max_size=5),
    st.floats(1e-3, 1e3),
)
def test_removing_a_client_moves_the_sum_by_at_most_the_clip_norm(
    updates: list[tuple[float, int, float]], bound: float
) -> None:
    dp, changes = ClientDP(clip=bound), [model(*update) for update in updates]
    with pytest.MonkeyPatch.context() as patch:
        without_noise(patch)
        whole, less = (outcome(dp, c).change for c in (changes, changes[1:]))
    moved = {key: (whole[key] - less[key]) * sampling_of(POISSON).expected for key in whole}
    assert length(moved) <= bound * (1 + 1e-6)


def test_the_order_of_arrival_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    changes = [model() | {"encoder.weight": rng.normal(size=(3, 2))} for _ in range(40)]
    one, other = (outcome(ClientDP(clip=0.3), order).change for order in (changes, changes[::-1]))
    assert_same({k: np.asarray(v) for k, v in one.items()}, {k: np.asarray(v) for k, v in other.items()})


def test_the_server_clips_what_a_client_has_not() -> None:
    dp = ClientDP()
    session = dp.open(model(), Occasion(1, 1, [0]), dp.begin(POISSON), POISSON, lambda questions: {})
    session.add(0, {key: value.astype(np.float32) for key, value in model(1000.0).items()})
    assert length(session.sums) <= 1
    with pytest.raises(ProtocolError, match=r"encoder\.scale"):
        session.add(1, {key: value for key, value in model().items() if key != "encoder.scale"})


def test_weights_are_capped_and_the_divisor_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    without_noise(monkeypatch)
    change = outcome(ClientDP(weight_cap=40), [model(100.0)]).change  # of 10 examples
    assert length(change) == pytest.approx(0.25 / 100, rel=1e-6)
    change = outcome(ClientDP(weight_cap=5), [model(100.0)]).change
    assert length(change) == pytest.approx(1 / 100, rel=1e-6)


# Adaptive clipping.


@pytest.mark.parametrize("first", [0.1, 100.0])
def test_the_clip_norm_converges_to_the_median(first: float) -> None:
    # Norms 1 .. 10, everybody in every round. Flower 1.41 has the sign the other way round and diverges.
    plan, dp = Planned(10, 1, 0, Synchronous()), ClientDP(clip=first, quantile=0.5, noise_multiplier=0.5)
    updates = [{**model(), "encoder.scale": np.array(float(norm))} for norm in range(1, 11)]
    memory = dp.begin(plan)
    for at in range(1, 101):
        session = dp.open(model(), Occasion(at, 1, range(10)), memory, plan, lambda questions: {})
        for client, update in enumerate(updates):
            session.add(client, dp.send(update, session.told(client), Sender(client, at, 1, 10, 0)))
        found = session.finish()
        assert found is not None
        memory = found.memory
    assert memory.numbers["clip_norm"] == pytest.approx(5.5, abs=1)


def test_the_wrong_sign_and_bit_would_diverge() -> None:
    for first in (0.1, 100.0):
        bound = first
        for _ in range(60):  # as Flower 1.41: the share that *was* clipped, in the update for that which was not
            bound = adapted(bound, sum(norm > bound for norm in range(1, 11)) / 10, 0.5, 0.2)
        assert not 1 <= bound <= 10


def test_bits_and_updates_together_cost_what_is_declared() -> None:
    dp = ClientDP(noise_multiplier=1.0, quantile=0.5)
    updates, bits = dp.noises(POISSON)
    assert bits == 5  # a twentieth of 100
    assert (updates**-2 + (2 * bits) ** -2) ** -0.5 == pytest.approx(1)
    with pytest.raises(PrivacyError, match="bit_noise above 0.5"):
        ClientDP(noise_multiplier=1.0, quantile=0.5, bit_noise=0.4).admit(POISSON)
    # A client that comes or goes moves the centred bit by 1/2; that of 0 and 1 it would move by 1.
    wire = dp.send(model(5.0), {"clip_norm": 1.0}, Sender(0, 1, 1, 10, 0))
    session = dp.open(model(), Occasion(1, 1, [0]), dp.begin(POISSON), POISSON, lambda questions: {})
    assert wire[BELOW] == 0
    session.add(0, wire | {BELOW: np.array(-1e9, np.float32)})
    assert abs(session.bits) == 0.5


# Noise.


def test_noise_has_the_declared_deviation() -> None:
    dp, draws = ClientDP(clip=0.7, noise_multiplier=1.3), 300
    values = np.concatenate([outcome(dp, [], at=at).change["encoder.weight"].ravel() for at in range(draws)])
    deviation = 1.3 * 0.7 / (0.1 * 1000)
    statistic = float(np.square(values / deviation).sum())
    low, high = chi2.ppf([1e-4, 1 - 1e-4], len(values))
    assert low < statistic < high


def test_no_two_draws_of_noise_are_alike() -> None:
    dp = ClientDP()
    asked = {"encoder.a": np.zeros(50), "encoder.b": np.zeros(50)}
    drawn = []
    for at, attempt in ((1, 1), (2, 1), (1, 2)):
        session = dp.open(asked, Occasion(at, attempt, []), dp.begin(POISSON), POISSON, lambda questions: {})
        drawn += list(session.finish().change.values())  # type: ignore[union-attr]
    local = LocalDP(delta=1e-5)
    for client, at, attempt in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        drawn += list(local.send(asked, {SPREAD: 1.0}, Sender(client, at, attempt, 10, 0)).values())
    correlations = np.corrcoef(np.stack(drawn)) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 0.6
    assert_same(outcome(dp, []).change, outcome(dp, []).change)


def test_noise_of_the_system_is_normal_and_does_not_repeat() -> None:
    source = Noise(0, secure=True)
    a, b = (source.normal((101, 99), 1) for _ in range(2))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06
    assert abs(a.mean()) < 0.06
    assert abs(a.std() - 1) < 0.04
    assert abs((np.abs(a) < 1).mean() - 0.6827) < 0.03


# Accounting.


def test_what_a_hundred_rounds_of_a_hundred_of_a_thousand_cost() -> None:
    delta = 1000**-1.1
    assert planned(ClientDP(), POISSON).epsilon(delta) == pytest.approx(5.15, abs=0.01)
    assert planned(ClientDP(), POISSON).epsilon(1e-5, "rdp") == pytest.approx(7.90, abs=0.01)
    fixed = Planned(1000, 100, 0, Synchronous(0.1))
    accountant = RDPAccountant()
    accountant.history = [(1.0, 1.0, 100)]
    assert accountant.get_epsilon(1e-5) == pytest.approx(96.1, abs=0.3)
    exact = planned(ClientDP(), fixed).epsilon(1e-5)
    assert exact == pytest.approx(gaussian_epsilon(0.1, 1, 1e-5))
    assert 90 < exact < 96.1


@pytest.mark.parametrize(
    ("clients", "cohort", "rate_delta", "expected"),
    [(10_000, 100, 10_000**-1.1, 0.60), (100_000, 1000, 100_000**-1.1, 0.83), (100, 10, 100**-1.1, 3.72)],
)
def test_the_table_of_client_level_epsilons(clients: int, cohort: int, rate_delta: float, expected: float) -> None:
    plan = Planned(clients, 100, 0, Synchronous(cohort / clients, "poisson"))
    assert planned(ClientDP(delta=0.5), plan).epsilon(rate_delta) == pytest.approx(expected, abs=0.01)


def test_the_page_has_the_costs() -> None:
    page = (ROOT / "docs" / "client_privacy.md").read_text()
    for participation in (Synchronous(0.1, "poisson"), Synchronous(0.1), Cohorts(10)):
        ledger = planned(ClientDP(), Planned(1000, 100, 0, participation))
        row = " | ".join(f"{ledger.epsilon(delta):.2f}" for delta in (1000**-1.1, 1e-5))
        assert f"| {row} |" in page


def test_a_target_is_met_by_the_planned_rounds() -> None:
    delta = 1000**-1.1
    dp = ClientDP(noise_multiplier=None, target_epsilon=2.0)
    assert 1.98 < planned(dp, POISSON).epsilon(delta) <= 2.0
    cohorts = Planned(1000, 10, 0, Cohorts(4))
    assert sampling_of(cohorts).turns == 3
    assert len(planned(dp, cohorts).entries) == 3
    assert planned(dp, cohorts).epsilon(delta) == pytest.approx(2.0)


def test_local_noise_is_solved_for_twice_the_clip_norm() -> None:
    plan = Planned(1000, 20, 0, Cohorts(4))
    dp = LocalDP(clip=0.5, delta=1e-5)
    multiplier = dp.multiplier(plan)
    assert multiplier == gaussian_multiplier(8.0, 5, 1e-5)
    assert f"{gaussian_epsilon(multiplier, 5, 1e-5):.2f}" == "8.00"
    assert planned(dp, plan).epsilon(1e-5) == pytest.approx(8.0)
    session = dp.open(model(), Occasion(1, 1, [0]), dp.begin(plan), plan, lambda questions: {})
    assert session.told(0)[SPREAD] == 2 * 0.5 * multiplier
    # With the clip norm itself for the sensitivity of a replacement, the same noise would cost far more.
    assert gaussian_epsilon(multiplier / 2, 5, 1e-5) > 16
    (sentence,) = dp.remarks(plan, 10_000)
    assert f"{2 * multiplier * 100:.4g} times the clip norm" in sentence


def test_the_turns_of_the_worst_client_are_counted() -> None:
    plan = Planned(50, 30, 3, Synchronous(0.2))
    counts = np.zeros(50, int)
    for at in range(1, 31):
        for turn in plan.participation.plan(50, at, 3).turns:
            counts[turn.client] += 1
    assert sum(entry.count for entry in planned(LocalDP(delta=1e-5), plan).entries) == counts.max()


def test_a_repeated_round_is_paid_for() -> None:
    for dp, plan in (
        (ClientDP(), POISSON),
        (ClientDP(), Planned(1000, 10, 0, Cohorts(4))),
        (LocalDP(), Planned(1000, 10, 0, Cohorts(4))),
    ):
        assert dp.entry(plan, 2, 2).count == 1
        assert dp.entry(plan, 2, 2).noise_multiplier == dp.entry(plan, 1, 1).noise_multiplier


@pytest.mark.parametrize(
    ("clients", "delta", "participation", "words"),
    [
        (100, None, Synchronous(), "publish one client in 158"),
        (1000, 1.5, Synchronous(), "no probability"),
        (1000, None, Buffered(), "participation=poisson, uniform or cohorts"),
    ],
)
@pytest.mark.parametrize("kind", [ClientDP, LocalDP])
def test_what_cannot_be_claimed_is_refused(
    kind: Callable[..., Any], clients: int, delta: float | None, participation: Any, words: str
) -> None:
    with pytest.raises(PrivacyError, match=words):
        kind(delta=delta).admit(Planned(clients, 2, 0, participation))


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.0},
        {"noise_multiplier": None},
        {"target_epsilon": 1.0},
        {"noise_multiplier": -1.0},
        {"quantile": 1.0},
        {"bit_noise": 0.0},
        {"weight_cap": 0},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"aggregation\."):
        ClientDP(**options)


# Whole runs.

PRIVATE = ("federation.clients=4", "participation=cohorts", "participation.groups=2", "federation.rounds=3")
DELTA = {"client_dp": ("aggregation.delta=0.01",), "local_dp": ("aggregation.delta=0.01",)}
DELTA["ftrl"] = ("aggregation.delta=0.01", "aggregation.band=2")
DELTA["secure_dp"] = ("aggregation.delta=0.01",)
STRATEGIES = ("fedadam", "fedavg", "fedema")
TURN = tuple(zip(config.options_of("aggregation"), itertools.cycle(STRATEGIES), strict=False))


@pytest.mark.parametrize(
    ("aggregation", "strategy"),
    [  # all 21 take a minute: every aggregation, every strategy with at least two, and one with all of them
        *TURN,
        *(("client_dp", strategy) for strategy in STRATEGIES if ("client_dp", strategy) not in TURN),
    ],
)
def test_every_aggregation_runs_repeats_and_resumes(
    aggregation: str, strategy: str, plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"aggregation={aggregation}", *DELTA.get(aggregation, ()), f"strategy={strategy}", "method=byol")
    first = plan(*options, *PRIVATE, "evaluate.every=1", "encoder.norm=batch", name="first")
    rundir = execute(first)
    again = execute(
        plan(*options, *PRIVATE, "evaluate.every=1", "encoder.norm=batch", "engine.workers=1", name="again")
    )
    assert_same(final_arrays(rundir), final_arrays(again))
    assert_same(final_arrays(rundir), resumed(first.at(first.path.parent / "resumed"), monkeypatch))
    summary = rundir.read("summary.json")
    if aggregation not in DELTA:
        assert summary["epsilon"] is None
        assert rundir.read("privacy.json")["unit"] is None
        return
    said = rundir.read("privacy.json")
    assert summary["epsilon"] == said["epsilon"] == said["planned_epsilon"]
    assert rundir.rows()[-1]["epsilon"] == pytest.approx(said["epsilon"])
    assert said["unit"] == "client"
    assert any("seed of the run" in hole for hole in said["not_covered"])
    assert json.loads((first.path.parent / "resumed" / "privacy.json").read_text()) == said


def test_a_round_with_nobody_is_noise(plan: Compose) -> None:
    options = ("aggregation=client_dp", "aggregation.delta=0.01", "participation=poisson", "strategy=fedadam")
    rundir = execute(plan(*options, "participation.fraction=1e-6"))
    rows = rundir.rows()
    assert [row["clients"] for row in rows] == [0, 0]
    assert not any(row.get("skipped") for row in rows)
    assert all(row["change_norm"] == pytest.approx(row["noise_norm"], rel=0.2) for row in rows)


def test_the_adapted_clip_norm_survives(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("aggregation=client_dp", "aggregation.delta=0.01", "aggregation.quantile=0.5", "federation.rounds=3")
    noise = ("aggregation.noise_multiplier=0.1", "aggregation.bit_noise=0.5", "aggregation.weight_cap=10")
    whole = plan(*options, *noise, name="whole")
    rundir = execute(whole)
    bounds = [row["clip_norm"] for row in rundir.rows()]
    assert len(set(bounds)) == 3
    assert_same(final_arrays(rundir), resumed(whole.at(whole.path.parent / "parts"), monkeypatch))


def begun(plan: Plan, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed in the midst of round `at`, when its clients have been asked."""
    original = Aggregator.one

    def killed(self: Aggregator, *arguments: Any) -> Any:
        if self.job.federation.rounds and len(self.ledger.entries) == at:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Aggregator, "one", killed)
        execute(plan)


@pytest.mark.parametrize("killed", [1, 2])
def test_a_round_that_was_lost_is_paid_for_and_its_noise_is_never_used_again(
    killed: int, plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("aggregation=client_dp", "aggregation.delta=0.01", "federation.rounds=3")
    whole = plan(*options, name="whole")
    lost = whole.at(whole.path.parent / "lost")
    begun(lost, killed, monkeypatch)
    once, twice = execute(whole), execute(lost)
    assert twice.read("privacy.json")["worst"]["count"] == 4
    assert twice.read("summary.json")["epsilon"] > once.read("summary.json")["epsilon"]
    one, other = final_arrays(once), final_arrays(twice)
    assert any((one[key] != other[key]).any() for key in one)


def test_the_budget_stops_before_a_repeated_round(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = ("aggregation.noise_multiplier=null", "aggregation.target_epsilon=2", "aggregation.delta=0.01")
    lost = plan("aggregation=client_dp", *noise, "federation.rounds=3")
    begun(lost, 2, monkeypatch)
    rundir = execute(lost)
    summary = rundir.read("summary.json")
    assert summary["rounds"] == 2  # and the third would have been one too many
    assert summary["epsilon"] == pytest.approx(2.0)
    assert compose([Release(lost.job.aggregation.multiplier(lost.job.planned), 1.0, 4)], 0.01) > 2  # type: ignore[attr-defined]


def test_both_units_are_claimed_apart(plan: Compose) -> None:
    options = ("method=byol", "method.norm=group", "privacy=example", "aggregation=client_dp", "aggregation.delta=0.01")
    with pytest.raises(ConfigError, match=r"privacy\.sample_rate=0\.1"):
        plan(*options)
    with pytest.raises(ConfigError, match="aggregation=ftrl"):
        plan(*options, "privacy.sample_rate=0.5", "aggregation.secure=true")
    rundir = execute(plan(*options, "privacy.sample_rate=0.5", "federation.rounds=1"))
    said = rundir.read("privacy.json")
    assert (said["unit"], said["record"]["unit"]) == ("client", "record")
    row = rundir.rows()[0]
    assert row["epsilon"] == pytest.approx(said["epsilon"])
    assert row["record_epsilon"] == pytest.approx(said["record"]["epsilon"], rel=0.01)


def test_secure_cohorts_do_not_follow_from_the_seed_and_survive(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("aggregation=client_dp", "aggregation.delta=0.01", "participation=poisson", "federation.clients=20")
    one = plan(*options, "aggregation.secure=true", "participation.fraction=0.5", "partition=iid", name="one")
    resumed(one, monkeypatch)
    rundir = one.open()
    secret = rundir.secret()
    assert secret != one.job.seed
    assert (rundir.path / "secret.json").stat().st_mode & 0o077 == 0
    for at in (1, 2):
        came = [row["client"] for row in rundir.rows("clients.jsonl") if row["round"] == at]
        assert came == [turn.client for turn in one.job.participation.plan(20, at, secret).turns]
        assert came != [turn.client for turn in one.job.attendance(at).turns]
    assert not any("seed of the run" in hole for hole in rundir.read("privacy.json")["not_covered"])
