"""What a device's owner sets: time for a round, bounds of battery and heat. Nothing here looks at a real clock."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import assert_same, execute, final_arrays
from test_methods import batch_of, job_of, model_of

from fedssl.client import Training, fit
from fedssl.config import Plan
from fedssl.edge import allowance, sensors
from fedssl.edge.allowance import Allowance
from fedssl.edge.limits import Limits
from fedssl.errors import ConfigError
from fedssl.flower import client_app
from fedssl.flower.in_process import InProcessGrid
from fedssl.gradient import PlainGradient
from fedssl.model import to_arrays
from fedssl.parts import Arrays
from fedssl.rundir import RunDirectory

Compose = Callable[..., Plan]
ONE_BY_ONE = (
    "engine.workers=1",
    "local.epochs=2",
    "partition=iid",
)  # five steps of 8 of 20 examples are six: two a pass
PRIVATE = (
    "method=byol",
    "method.norm=layer",
    "privacy=example",
    "privacy.sample_rate=1.0",  # whose accounting is a closed form
    "local.epochs=10",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.0",
)


class Clock:
    """Goes on by a second with every step that is taken, or by whatever a step of that round takes."""

    now = 0.0
    slower: Mapping[int, float] = {}  # by round

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        there = SimpleNamespace(monotonic=lambda: self.now)
        patch.setattr(allowance, "time", there)
        patch.setattr(client_app, "time", there)
        step = Training.step

        def taken(training: Training, *given: Any) -> None:
            step(training, *given)
            self.now += self.slower.get(training.round, 1.0)

        patch.setattr(Training, "step", taken)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, Mapping[str, Any]]], None]:
    """Gives nodes their owners' words, by client."""
    genuine = InProcessGrid._make

    def given(words: Mapping[int, Mapping[str, Any]]) -> None:
        def make(grid: InProcessGrid, node: int) -> Any:
            context = genuine(grid, node)
            context.node_config.update(words.get(node - 1, {}))
            return context

        monkeypatch.setattr(InProcessGrid, "_make", make)

    return given


def rows(run: RunDirectory, key: str) -> list[list[float]]:
    """A number of each client, in order, by round."""
    found = run.rows("clients.jsonl")
    return [[row[key] for row in found if row["round"] == at] for at in sorted({row["round"] for row in found})]


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 1), (1.9, 1), (2.0, 2), (3.7, 3), (99.0, 6)])
def test_steps_that_fit_are_the_first_of_the_round(clock: Clock, seconds: float, steps: int) -> None:
    job = job_of("byol", "local.epochs=3")
    found: list[Arrays] = []
    for given in ({"allowance": Allowance(seconds)}, {"work": steps / 6}):
        model = model_of(job)
        shard = job.data.load().train.shard(batch_of(job, 16).index.numpy(), 0)
        about = {"round": 1, "rounds": 2, "seed": 0, "client": 0, "gradient": PlainGradient()}
        result = fit(job.method, model, shard, job.data.augment, job.local, **about, **given)  # type: ignore[arg-type]
        assert (result.steps, result.work) == (steps, pytest.approx(steps / 6))
        found.append(to_arrays(model))
    assert_same(*found)


def test_a_slow_device_reports_what_it_has_done(plan: Compose, nodes: Any, clock: Clock) -> None:
    nodes({1: {"time-budget": 2.5}})
    run = execute(plan(*ONE_BY_ONE))
    assert rows(run, "steps") == [[6, 2, 6]] * 2
    assert rows(run, "work") == [[1, pytest.approx(1 / 3), 1]] * 2


def test_time_enough_changes_no_bit(plan: Compose, nodes: Any, clock: Clock) -> None:
    free = final_arrays(execute(plan(*ONE_BY_ONE, name="free")))
    nodes({client: {"time-budget": 1000} for client in range(3)})
    assert_same(final_arrays(execute(plan(*ONE_BY_ONE, name="counted"))), free)


def test_a_private_device_chooses_before_it_pays(plan: Compose, nodes: Any, clock: Clock) -> None:
    """One step to know how long it takes, then as many as fit; the clock stops none that has been paid for."""
    nodes({0: {"time-budget": 4.5}})
    clock.slower = {2: 2.0}
    run = execute(plan(*PRIVATE, "engine.workers=1", "federation.rounds=3"))
    assert rows(run, "steps") == [[1, 10, 10], [4, 10, 10], [2, 10, 10]]
    assert rows(run, "spent") == [[1, 10, 10], [5, 20, 20], [7, 30, 30]]


def test_the_share_of_a_round(clock: Clock) -> None:
    time = Allowance(10.0)
    assert time.share(8, None) == 1 / 8
    assert time.share(8, 3.0) == 3 / 8
    assert time.share(8, 100.0) == 1 / 8, "a round takes one step at least"
    assert time.share(8, 0.0) == 1
    clock.now += 4
    assert time.share(8, 3.0) == 2 / 8, "what has gone by is gone"
    clock.now += 90
    assert time.left < 0
    assert time.share(8, 3.0) == 1 / 8


def sysfs(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def supply(name: str, **files: object) -> dict[str, str]:
    return {f"power_supply/{name}/{key}": str(value) for key, value in files.items()}


LOW = supply("BAT0", type="Battery", capacity=15, status="Discharging")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        (supply("AC", type="Mains", online=1), None),
        (LOW, (0.15, False)),
        (LOW | supply("AC", type="Mains", online=1), (0.15, True)),
        (LOW | supply("AC", type="Mains", online=0), (0.15, False)),
        (LOW | supply("BAT0", status="Charging"), (0.15, True)),
        (LOW | supply("BAT0", status="Not charging"), (0.15, True)),
        (LOW | supply("BAT1", type="Battery", capacity=45, status="Unknown"), (0.3, False)),
        (LOW | supply("mouse", type="Battery", scope="Device", capacity=99, status="Full"), (0.15, False)),
        (supply("mouse", type="Battery", scope="Device", capacity=99, status="Full"), None),
        (supply("BAT0", type="Battery", status="Full"), None),
    ],
)
def test_batteries_as_linux_shows_them(files: dict[str, str], found: tuple[float, bool] | None, tmp_path: Path) -> None:
    read = sensors.battery(sysfs(tmp_path, files))
    assert (None if read is None else (pytest.approx(read.charge), read.powered)) == found


def test_the_hottest_zone_counts(tmp_path: Path) -> None:
    assert sensors.celsius(tmp_path) is None
    zones = {"thermal/thermal_zone0/temp": "41500", "thermal/thermal_zone1/temp": "83250"}
    (tmp_path / "thermal/thermal_zone2/temp").mkdir(parents=True)  # a sensor that cannot be read
    assert sensors.celsius(sysfs(tmp_path, zones | {"thermal/cooling_device0/temp": "99000"})) == 83.25
    assert sensors.celsius(sysfs(tmp_path, {"thermal/thermal_zone1/temp": "-5000"})) == 41.5


def test_bounds_are_held(tmp_path: Path) -> None:
    root = sysfs(tmp_path, LOW | {"thermal/thermal_zone0/temp": "60000"})
    assert Limits.of({"partition-id": 3}).declined(root) == ""
    assert Limits.of({"min-battery": 0.15, "max-celsius": 60}).declined(root) == ""
    assert "at 15%, below min-battery=0.2, not charging" in Limits.of({"min-battery": 0.2}).declined(root)
    assert "has 60 degrees Celsius, above max-celsius=59.5" in Limits.of({"max-celsius": 59.5}).declined(root)
    sysfs(root, supply("AC", type="Mains", online=1))
    assert Limits.of({"min-battery": 0.2}).declined(root) == ""
    for bound, place in (({"min-battery": 0.2}, "power_supply"), ({"max-celsius": 80.0}, "thermal")):
        with pytest.raises(ConfigError, match=rf"shows no .*{place}: .*leave it out"):
            Limits.of(bound).declined(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "words",
    [
        {"time-budget": 0},
        {"time-budget": "60"},
        {"time-budget": float("inf")},
        {"min-battery": 20},
        {"min-battery": True},
        {"max-celsius": float("nan")},
    ],
)
def test_bounds_that_are_none_are_refused(words: dict[str, object]) -> None:
    (key, value), *_ = words.items()
    with pytest.raises(ConfigError, match=re.escape(f"this node has {key}={value!r}: give ")):
        Limits.of(words)


@pytest.mark.parametrize("options", [(), PRIVATE, ("aggregation=client_dp", "participation=cohorts")])
def test_a_device_out_of_bounds_sits_a_round_out(
    options: tuple[str, ...],
    plan: Compose,
    nodes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sensors, "ROOT", sysfs(tmp_path / "sys", LOW))
    nodes({1: {"min-battery": 0.2}})
    if "aggregation=client_dp" in options:
        options = (*options, "participation.groups=1", "aggregation.delta=1e-5")
    with caplog.at_level(logging.WARNING, "fedssl"):
        run = execute(plan(*options))
    said = [record.getMessage() for record in caplog.records if "takes no step" in record.getMessage()]
    assert said == [
        f"this node takes no step in round {at}: its battery is at 15%, below min-battery=0.2, not charging"
        for at in (1, 2)
    ]
    assert [row["failures"] for row in run.rows()] == [0, 0]
    if "aggregation=client_dp" not in options:  # which tells nothing of one client
        assert [[steps == 0 for steps in row] for row in rows(run, "steps")] == [[False, True, False]] * 2
        assert [row["clients"] for row in run.rows()] == [2, 2]
    if "privacy=example" in options:
        assert [row[1] for row in rows(run, "spent")] == [0, 0]
