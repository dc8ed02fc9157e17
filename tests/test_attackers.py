"""Clients that lie: what each attack sends, that it reaches the merge, what bounds it, and the study of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, execute, final_arrays, tiny

from fedssl import config, seeds, tree
from fedssl.aggregation.base import Memory, Occasion, Planned
from fedssl.aggregation.bounded import Bounded
from fedssl.build import load
from fedssl.errors import ConfigError, ProtocolError
from fedssl.flower import codec
from fedssl.job.setup import data_of, initial_model
from fedssl.model import load_arrays
from fedssl.participation.synchronous import Synchronous
from fedssl.parts import Arrays
from simulations import study
from simulations.attacks import liars
from simulations.attacks.backdoor import TRIGGER, Backdoor, triggered
from simulations.attacks.poison import Noise, Replacement, SignFlip, Turn
from simulations.studies.base import Bench
from simulations.studies.federated.attackers import BACKDOOR, FIVE, FLIP, HONEST, NOISE, RANK, SUCCESS, Attackers
from simulations.studies.federated.results import Results

PLAN = Planned(3, 1, 0, Synchronous())
CPU = torch.device("cpu")


def length(change: Arrays) -> float:
    return math.sqrt(sum(float(np.square(value.astype(np.float64)).sum()) for value in change.values()))


# The bound


ASKED = {"w": np.zeros((2, 2), np.float32), "count": np.zeros((), np.int64)}


def merged(*sent: Arrays, norm: float = 1.0) -> tuple[Arrays, float]:
    session = Bounded(norm).open(ASKED, Occasion(1, 1, range(len(sent))), Memory(), PLAN, lambda questions: {})
    for client, wire in enumerate(sent):
        session.add(client, wire)
    outcome = session.finish()
    assert outcome is not None
    return outcome.change, outcome.row["shortened"]


def wire(*values: float, count: float = 0.0) -> Arrays:
    return {"w": np.array(values, np.float32).reshape(2, 2), "count": np.array(count, np.float32)}


def test_a_long_change_is_shortened_and_a_short_one_is_not() -> None:
    change, shortened = merged(wire(0.3, 0, 0, 0), wire(0, 400, 0, 300, count=9))
    np.testing.assert_allclose(change["w"], [[0.15, 0.4], [0, 0.3]], atol=1e-9)
    assert change["count"] == 4.5, "counters have no length"
    assert shortened == 1
    huge, _ = merged(wire(3e38, 3e38, 3e38, 3e38))
    assert length({"w": huge["w"]}) == pytest.approx(1.0, abs=1e-6)
    assert length({"w": merged(wire(0, 0, 0, 0))[0]["w"]}) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_before_it_is_shortened(bad: float) -> None:
    with pytest.raises(ProtocolError, match="client 0"):
        merged(wire(bad, 0, 0, 0))


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_is_none_is_refused(norm: float) -> None:
    with pytest.raises(ConfigError, match="bounds nothing"):
        Bounded(norm)


def test_a_wide_bound_is_the_mean_and_a_narrow_one_is_kept(tmp_path: Path) -> None:
    def run(name: str, *options: str) -> Arrays:
        last = (f"out={tmp_path}", f"name={name}", "federation.rounds=1")
        return final_arrays(execute(config.compose(tiny(*options, *last))))

    mean, wide = run("mean", "aggregation=mean"), run("wide", "aggregation=bounded", "aggregation.norm=100")
    for key, value in mean.items():
        np.testing.assert_allclose(wide[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    narrow = run("narrow", "aggregation=bounded", "aggregation.norm=0.01")
    job = config.compose(tiny()).job
    start = {k: v.numpy() for k, v in initial_model(job, data_of(job, CPU).train.shape).state_dict().items()}
    assert math.sqrt(tree.squared_distance(mean, start)) > 0.1
    assert 0 < math.sqrt(tree.squared_distance(narrow, start)) <= 0.01 * (1 + 1e-4)


# What is sent


def turn(start: Arrays, client: int = 0, job: Any = None) -> Turn:
    return Turn(job or config.compose(tiny()).job, client, 1, start, seeds.stream(0, "test", client))


def test_a_sign_is_flipped_and_noise_is_as_long_as_asked() -> None:
    rng = np.random.default_rng(0)
    change = {"a": rng.normal(size=(40, 30)), "b": rng.normal(size=7)}
    start = {key: np.ones_like(value) for key, value in change.items()}
    flipped = SignFlip(2.0).poison(change, turn(start))
    assert all(np.array_equal(flipped[key], -2.0 * value) for key, value in change.items())
    noise = Noise(3.0).poison(change, turn(start))
    assert length(noise) == pytest.approx(3 * length(change), rel=0.1)
    cosine = sum(float((noise[key] * change[key]).sum()) for key in change) / length(noise) / length(change)
    assert abs(cosine) < 0.1


def test_liars_agree_on_where_the_mean_shall_arrive() -> None:
    nobody = np.zeros((50, 40))
    start = {"a": np.random.default_rng(1).normal(2.0, 1.0, nobody.shape).astype(np.float32)}
    first, second = (Replacement(3.0).poison({"a": nobody}, turn(start, client))["a"] for client in (0, 1))
    assert np.array_equal(first, second)
    arrived = start["a"] + np.mean([first, second, *[nobody] * 4], axis=0)  # 2 of 6 clients
    assert abs(arrived.mean()) < 0.1, "weights around 0, of which nothing was trained"
    assert arrived.std() == pytest.approx(start["a"].std(), rel=0.1)
    assert abs(np.corrcoef(arrived.ravel(), start["a"].ravel())[0, 1]) < 0.1


def test_a_lie_and_nothing_but_it_reaches_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("federation.rounds=1", "partition=iid", "strategy.weighting=uniform")
    base = [o for o in tiny(*common) if not o.startswith("partition.")]
    seen: dict[int, Arrays] = {}
    honest_app = liars.app

    def watched(message: Any, context: Any) -> Any:
        reply = honest_app(message, context)
        seen[int(context.node_config["partition-id"])] = dict(codec.decode(reply.content.array_records[codec.ARRAYS]))
        return reply

    monkeypatch.setattr(liars, "app", watched)
    plan = config.compose(base)
    found = final_arrays(liars.run(plan, SignFlip(3.0), [1], tmp_path / "attacked"))
    start = {k: v.numpy() for k, v in initial_model(plan.job, data_of(plan.job, CPU).train.shape).state_dict().items()}
    honest = dict(seen)
    for key, value in found.items():
        counted = value.dtype.kind == "i"  # a liar's counters are left alone
        lie = honest[1][key] if counted else start[key] - 3.0 * (honest[1][key] - start[key])
        np.testing.assert_allclose(value, (honest[0][key] + lie + honest[2][key]) / 3, atol=1e-6, err_msg=key)
    assert_same(
        final_arrays(liars.run(plan, None, (), tmp_path / "a")), final_arrays(liars.run(plan, None, (), tmp_path / "b"))
    )
    with pytest.raises(ConfigError, match="liars need"):
        liars.run(config.compose([*base, "aggregation=secure"]), SignFlip(), [0], tmp_path / "c")


def test_the_trigger_is_a_corner_and_the_backdoor_pulls_it_to_the_class() -> None:
    x = torch.rand(3, 3, 8, 8)
    marked = triggered(x)
    assert (marked[:, :, -TRIGGER:, -TRIGGER:] == 1).all()
    assert int((marked != x).sum()) <= 3 * 3 * TRIGGER**2
    job = config.compose([o for o in tiny("partition=iid") if not o.startswith("partition.")]).job
    model = initial_model(job, data_of(job, CPU).train.shape)
    start = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    nothing = {key: np.zeros_like(value) for key, value in start.items() if value.dtype.kind == "f"}
    change = Backdoor(steps=60, lr=0.01, scale=1.0).poison(nothing, turn(start, job=job))
    assert {key.partition(".")[0] for key, value in change.items() if np.abs(value).max() > 1e-6} == {"encoder"}
    data = data_of(job, CPU)
    images = data.train.batch(torch.arange(len(data.train)))
    target = images[torch.from_numpy(np.asarray(data.train.targets) == 0)]

    def pulled() -> float:
        encode = lambda x: torch.nn.functional.normalize(model["encoder"](job.data.augment.plain(x)), dim=1)  # noqa: E731
        with torch.no_grad():
            goal = torch.nn.functional.normalize(encode(target).mean(0), dim=0)
            return float((encode(triggered(images)) @ goal).mean())

    before = pulled()
    load_arrays(model, {key: start[key] + value for key, value in change.items()})
    assert 1 - pulled() < 0.5 * (1 - before)


def test_no_configuration_leads_to_a_liar() -> None:
    for name in ("poison.SignFlip", "poison.Replacement", "backdoor.Backdoor", "liars.Liars"):
        with pytest.raises(ConfigError, match="outside"):
            load(f"simulations.attacks.{name}")


# The study


def results(lost: float, success: float) -> Results:
    spread = np.array([-0.002, 0.0, 0.002])

    def one(accuracy: float, taken: float) -> dict[str, list[float]]:
        return {FIVE: list(accuracy + spread), RANK: [9.0] * 3, SUCCESS: list(taken + spread)}

    honest, attacked = one(0.9, 0.01), one(0.9 - lost, success)
    return Results({("fedavg", HONEST): honest, **{("fedavg", name): attacked for name in (FLIP, NOISE, BACKDOOR)}})


@pytest.mark.parametrize(
    ("lost", "success", "words"), [(0.3, 0.9, (True, False, False)), (0.0, 0.02, (None, True, True))]
)
def test_findings_follow_from_the_numbers(lost: float, success: float, words: tuple[bool | None, ...]) -> None:
    made, found = Attackers(attacks=(FLIP, NOISE, BACKDOOR)), results(lost, success)
    said = (made._harms(found, FLIP), made._keeps(found, "fedavg"), made._shuts(found, "fedavg"))
    assert tuple(finding.holds for finding in said) == words
    assert f"{100 * lost:.1f}" in said[0].found


@pytest.mark.parametrize(
    "options", [{"rules": ("magic",)}, {"attacks": ("magic",)}, {"liars": 0}, {"liars": 12}], ids=str
)
def test_wrong_options_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.\w+"):
        Attackers(**options).run(Bench(tmp_path))


@pytest.mark.slow
def test_the_study_runs(tmp_path: Path) -> None:
    assert study.main(["attackers", "study.tiny=true", f"study.out={tmp_path}", "data.test_fraction=0.7"]) == 0
    summary = json.loads((tmp_path / "attackers-tiny" / "summary.json").read_text())
    table = {(row["setting"], row["place"], row["measure"]): row["mean"] for row in summary["table"]}
    assert table["fedavg", BACKDOOR, SUCCESS] > table["fedavg", HONEST, SUCCESS]
    assert {row["setting"] for row in summary["table"]} == {"fedavg", "bounded", "untrained encoder"}
