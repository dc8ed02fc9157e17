"""The monitor's measures against numbers computed by hand, and its rows in whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import execute, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_methods import batch_of, job_of, model_of
from torch import nn

from fedssl import config, diagnostics
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.evaluation import Evaluator
from fedssl.evaluation.monitor import Monitor
from fedssl.measures import collapse
from fedssl.measures.collapse import WeightLog
from fedssl.measures.movement import Movement
from fedssl.measures.outputs import outputs, readable
from fedssl.model import ema_, parameters
from fedssl.networks.teacher import TEACHER
from fedssl.parts import Part

Compose = Callable[..., Plan]
AXES = torch.eye(4)


def mixed(*terms: float) -> float:
    return math.log(sum(terms) / len(terms))


# --- of features


def test_uniformity_within_and_across_clients_by_hand() -> None:
    two_points = AXES[[0, 0, 1, 1]]
    apart = collapse.uniformity_by_group(two_points, np.array([0, 0, 1, 1]))
    assert apart == pytest.approx((0.0, -4.0))  # each client sits on one point, the two are orthogonal
    crossed = collapse.uniformity_by_group(two_points, np.array([0, 1, 0, 1]))
    assert crossed == pytest.approx((-4.0, mixed(1, 1, math.exp(-4), math.exp(-4))))
    one = collapse.uniformity_by_group(AXES[[0, 0, 1, 1, 1]], np.array([0, 0, 0, 1, 1]), group=0)
    assert one == pytest.approx((mixed(1, math.exp(-4), math.exp(-4)), mixed(*[math.exp(-4)] * 4, 1, 1)))


def test_uniformity_without_a_pair_is_not_a_number() -> None:
    within, across = collapse.uniformity_by_group(AXES, np.arange(4))
    assert math.isnan(within)
    assert across == pytest.approx(-4.0)
    assert math.isnan(collapse.uniformity_by_group(AXES, np.zeros(4, np.int64))[1])
    with pytest.raises(ConfigError, match="one group for each row"):
        collapse.uniformity_by_group(AXES, np.zeros(3, np.int64))


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 4), st.sampled_from([3, 50, 10_000]))
def test_within_and_across_make_up_the_whole(seed: int, n: int, clients: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    x, groups = torch.from_numpy(rng.normal(size=(n, 3))), rng.integers(0, clients, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "_BLOCK", block)
        parts = collapse.uniformity_by_group(x, groups)
    same = (groups[:, None] == groups)[np.triu_indices(n, 1)].mean()
    total = sum(share * math.exp(value) for share, value in zip((same, 1 - same), parts, strict=True) if share)
    assert math.log(total) == pytest.approx(diagnostics.uniformity(x), abs=1e-9)


def test_examples_of_nobody_are_left_out() -> None:
    owners = np.array([0, 0, 1, -1])
    assert collapse.by_client(AXES[[0, 0, 1, 2]], owners)["uniformity_inter"] == pytest.approx(-4.0)
    assert collapse.by_client(AXES[[0, 0, 1, 0]], owners) == pytest.approx(
        {"uniformity_intra": 0.0, "uniformity_inter": -4.0}
    )
    assert collapse.by_client(AXES[[0, 0, 1, 0]], owners, 1).keys() == {"uniformity_inter"}


def test_spectrum_shares_tell_both_collapses_apart() -> None:
    cube = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    assert collapse.spectrum_shares(7 * cube) == pytest.approx([8 / 21] * 3)  # 8 / 7 of a third each
    assert collapse.spectrum_shares(cube * torch.tensor([1.0, 0, 0])) == pytest.approx([8 / 7, 0, 0])
    assert collapse.spectrum_shares(torch.ones(8, 3)) == pytest.approx([0, 0, 0])
    assert collapse.spectrum_shares(torch.zeros(8, 3)) == pytest.approx([0, 0, 0])
    assert collapse.spectrum_shares(cube + 10)[0] == pytest.approx(8 / 7 / 303)


def test_likeness_of_a_head_to_its_input() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert collapse.likeness(3 * x + 2, x) == pytest.approx(1.0)
    assert collapse.likeness(-x, x) == pytest.approx(-1.0)
    assert collapse.likeness(torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[0.0, 1], [0, -1]])) == 0
    assert math.isnan(collapse.likeness(torch.ones(5, 2), torch.ones(5, 2)))


def test_many_rows_are_thinned_evenly() -> None:
    x = torch.arange(2500.0)[:, None]
    kept = collapse.thin(x)[:, 0]
    assert (len(kept), kept[0], kept[-1]) == (1000, 0, 2499)
    assert kept.diff().unique().tolist() == [2, 3]
    assert collapse.thin(x[:1000]) is not None
    assert torch.equal(collapse.thin(x[:1000]), x[:1000])


# --- of weights


def log_of(now: dict[str, list[float]], *clients: dict[str, list[float]]) -> WeightLog:
    log = WeightLog({key: np.array(value, np.float32) for key, value in now.items()})
    for i, arrays in enumerate(clients):
        log.add(i, {key: np.array(value, np.float32) for key, value in arrays.items()})
    return log


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.34])
def test_a_mean_of_clients_that_differ_raises_nothing(scale: float) -> None:
    """Its length is below theirs by the triangle inequality; its product with the start is not, unless it is scaled."""
    log = log_of({"encoder.w": [1, 1]}, {"encoder.w": [3, 0]}, {"encoder.w": [0, 4]})
    merged = {"encoder.w": scale * np.array([0.75, 3.0])}  # weights 1 and 3
    found = log.compare(merged, {0: 1, 1: 3})["encoder"]
    assert found["norm_ratio"] == pytest.approx(scale * math.hypot(0.75, 3) / 3.75)
    assert found["merge_scale"] == pytest.approx(scale)


def test_weights_are_compared_part_by_part_and_array_by_array() -> None:
    now = {"encoder.a": [1.0], "encoder.b": [2.0], "projector.a": [1.0], "encoder.n": [5]}
    clients: list[dict[str, list[float]]] = [
        {"encoder.a": [2.0], "encoder.b": [4.0], "projector.a": [3.0]},
        {"encoder.a": [4.0], "projector.a": [1.0]},  # lacks a tower
    ]
    log = log_of(now, *clients)
    merged = {k: np.array(v) for k, v in {"encoder.a": [3.0], "encoder.b": [4.0], "projector.a": [1.0]}.items()}
    found = log.compare({**merged, "encoder.n": np.array([5.0])}, {0: 10, 1: 10})
    assert found["encoder"]["merge_scale"] == pytest.approx(1.0)  # (3 * 1 + 4 * 2) / (3 * 1 + 4 * 2)
    assert found["encoder"]["norm_ratio"] == pytest.approx(5 / math.hypot(2, 4))  # of the client that sent all
    assert found["projector"] == pytest.approx(
        {"merge_scale": 0.5, "norm_ratio": 0.5, "scale_low": 0.5, "scale_high": 1.5}
    )


def test_the_order_of_clients_does_not_matter_and_counters_are_no_weights() -> None:
    rng = np.random.default_rng(0)
    now = {"encoder.w": rng.normal(size=9).astype(np.float32), "encoder.count": np.array(3)}
    clients = {c: {"encoder.w": rng.normal(size=9).astype(np.float32), "encoder.count": np.array(c)} for c in range(5)}
    examples = {c: c + 1 for c in clients}
    found = []
    for order in (range(5), reversed(range(5))):
        log = WeightLog(now)
        for c in order:
            log.add(c, clients[c])
        found.append(log.compare(clients[0], examples))
    assert found[0] == found[1]


def test_clients_that_left_the_start_behind_say_nothing_of_the_scale() -> None:
    log = log_of({"encoder.w": [1, 0]}, {"encoder.w": [0, 5]})
    assert log.compare({"encoder.w": np.array([0, 5])}, {0: 1}).keys() == {"encoder"}
    assert log.compare({"encoder.w": np.array([0, 5])}, {0: 1})["encoder"].keys() == {"norm_ratio"}


# --- of training


def test_movement_by_hand() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 1, bias=False), "teacher": nn.ModuleDict()})
    model["teacher"]["encoder"] = nn.Linear(2, 1, bias=False)  # type: ignore[operator]  # a ModuleDict
    parts = (Part("encoder"), Part("teacher", trainable=False, follows=("encoder",)))
    student, teacher = model["encoder"].weight, model.get_submodule("teacher.encoder").weight
    with torch.no_grad():
        student.copy_(torch.tensor([[3.0, 4.0]]))
        teacher.copy_(torch.tensor([[3.0, 4.0]]))
        movement = Movement(parameters(model), parts)
        student.copy_(torch.tensor([[0.0, 4.0]]))
        movement.before_following()
        ema_(model, parts[1], 0.75)
    assert movement.measures()[0] == pytest.approx(
        {
            "encoder_moved": 3 / 5,
            "teacher_moved": 0.75 / 5,
            "teacher_gap": 2.25 / 4,
            "teacher_step": 0.25,
        }
    )


def test_a_teacher_that_is_its_student_has_no_gap() -> None:
    model = model_of(job_of("byol"))
    model["teacher"] = nn.ModuleDict({name: model[name] for name in TEACHER.follows})
    movement = Movement(parameters(model), job_of("byol").method.parts)
    with torch.no_grad():
        model["encoder"].get_parameter("0.weight").add_(1)
    movement.before_following()
    measures = movement.measures()[0]
    assert measures["teacher_gap"] == measures["teacher_step"] == 0
    assert measures["encoder_moved"] > 0
    assert measures["predictor_moved"] == 0


# --- of outputs


def test_heads_are_read_in_their_order_and_only_where_their_input_is_known() -> None:
    model = model_of(job_of("byol"))
    keys = list(model.state_dict())
    assert readable(model, keys) == ("encoder", "projector", "predictor", "teacher")
    assert readable(model, [k for k in keys if not k.startswith(("projector", "teacher"))]) == ("encoder",)
    assert readable(model, []) == ()
    assert readable(model_of(job_of("mae")), model_of(job_of("mae")).state_dict()) == ("encoder",)
    view = batch_of(job_of("byol"), 5).views[0]
    found = outputs(model, [view[:3], view[3:]], readable(model, keys))
    model.eval()
    with torch.no_grad():
        h = model["encoder"](view)
        z = model["projector"](h)
    for part, expected in (("encoder", h), ("projector", z), ("predictor", model["predictor"](z)), ("teacher", h)):
        torch.testing.assert_close(found[part], expected)


def test_an_encoder_sees_each_set_once(plan: Compose) -> None:
    job = plan("method=byol", "evaluate.examples=20").job
    data = job.data.load()
    evaluator = Evaluator(job, data, torch.device("cpu"))
    seen: list[int] = []
    evaluator._model["encoder"].register_forward_hook(lambda _m, x, _y: seen.append(len(x[0])))
    arrays = evaluator.random_encoder()
    look = evaluator.look(arrays, arrays.keys() - {k for k in arrays if k.startswith("teacher")})
    assert seen == [20, 20, 20, 20]  # the test examples, those of training, and two views
    assert look.queries.keys() == {"encoder", "projector", "predictor"}


# --- in runs


def rows_of(run: Any) -> dict[tuple[int, Any, str], dict[str, Any]]:
    return {(row["round"], row["client"], row["part"]): row for row in run.rows("collapse.jsonl")}


def test_a_run_leaves_a_row_for_each_round_model_and_part(plan: Compose) -> None:
    run = execute(plan("method=byol", "federation.rounds=4", "evaluate.every=2", "evaluate.clients=2"))
    rows = rows_of(run)
    parts = ("encoder", "projector", "predictor", "teacher")
    assert list(rows) == [(at, who, part) for at in (2, 4) for who in ("merged", 0, 1) for part in parts]
    assert len(run.rows("collapse.jsonl")) == len(rows)
    described = {
        *("dim", "examples", "rankme", "effective_rank", "feature_std", "uniformity", "spectrum", "alignment"),
        *("uniformity_intra", "uniformity_inter", "cka_clients", "cka_global", "moved"),
    }
    for (_, who, part), row in rows.items():
        own = (
            {"cka_round", "rankme_before", "norm_ratio", "merge_scale", "scale_low", "scale_high"}
            if who == "merged"
            else set()
        )
        identity = {"identity"} if part == "predictor" else set()
        expected = {"moved", "gap", "step"} if part == "teacher" else described | own | identity
        assert row.keys() == {"round", "client", "part"} | expected
    metrics = {row["round"]: row for row in run.rows()}
    for at in (2, 4):
        merged = rows[at, "merged", "encoder"]
        for key in ("rankme", "feature_std", "uniformity", "alignment", "uniformity_intra", "uniformity_inter"):
            assert metrics[at][key] == merged[key]
        assert metrics[at]["client_cka"] == merged["cka_clients"]
        assert metrics[at]["round_cka"] == merged["cka_round"]
        assert metrics[at]["client_rankme"] == pytest.approx(
            np.mean([rows[at, c, "encoder"]["rankme"] for c in (0, 1)])
        )
        assert metrics[at]["merge_scale"] == pytest.approx(1.0, abs=1e-5)
        assert merged["norm_ratio"] < 1
        assert 0 < metrics[at]["measure_seconds"] <= metrics[at]["seconds"]
    assert "rankme" not in metrics[1]
    replies = run.rows("clients.jsonl")
    mean = np.average([r["teacher_gap"] for r in replies if r["round"] == 4], weights=[20] * 3)
    assert rows[4, "merged", "teacher"]["gap"] == pytest.approx(mean, rel=0.5)
    assert rows[4, 1, "teacher"]["gap"] == next(
        r["teacher_gap"] for r in replies if (r["round"], r["client"]) == (4, 1)
    )


def test_parts_that_stay_at_home_are_measured_there_only(plan: Compose) -> None:
    options = ("method=byol", "strategy.share.projector=local", "strategy.share.teacher=local", "evaluate.every=1")
    rows = rows_of(execute(plan(*options, "federation.rounds=1")))
    assert "rankme" in rows[1, 0, "projector"]
    assert "rankme" in rows[1, 0, "predictor"]
    assert "rankme" in rows[1, 0, "teacher"]
    assert "cka_global" not in rows[1, 0, "projector"]
    assert rows[1, "merged", "projector"].keys() == {"round", "client", "part", "moved"}
    assert "rankme" not in rows[1, "merged", "predictor"], "it reads what stays at home"
    assert "merge_scale" in rows[1, "merged", "predictor"]


@pytest.mark.parametrize("modality", ["timeseries", "graphs", "pairs"])
def test_every_modality_is_watched(modality: str, plan: Compose, tmp_path: Any) -> None:
    options = tiny("method=simclr", "evaluate.every=1", "federation.rounds=1", modality=modality)
    run = execute(config.compose([*options, f"out={tmp_path}", "name=run"]))
    rows = rows_of(run)
    assert {key[2] for key in rows} == {"encoder", "projector"}
    assert all(np.isfinite(row["rankme"]) for row in rows.values())


def test_the_monitor_gives_the_same_rows_however_often_it_looks(plan: Compose) -> None:
    """A watched round reads models and changes nothing: the rows of a second look are the same."""
    job = plan("method=byol").job
    data = job.data.load()
    evaluator = Evaluator(job, data, torch.device("cpu"))
    monitor = Monitor(evaluator, [np.arange(30), np.arange(30, 60)], {}, [])
    initial = evaluator.random_encoder()
    now = {key: value for key, value in initial.items() if not key.startswith("teacher")}
    moved = {key: value * 1.1 if value.dtype.kind == "f" else value for key, value in now.items()}
    found = []
    for _ in range(2):
        watch = monitor.watch(1, initial, now, [0])
        watch.keep(0, moved, {})
        row, rows = monitor.close(watch, moved, [{"client": 0, "examples": 30, "encoder_moved": 0.1}])
        found.append(({key: value for key, value in row.items() if "seconds" not in key}, rows))
    assert found[0] == found[1]
    merged = next(row for row in found[0][1] if row["client"] == "merged" and row["part"] == "encoder")
    assert merged["merge_scale"] == pytest.approx(1.0)
    assert merged["moved"] == 0.1
    assert merged["cka_global"] == pytest.approx(1.0)
