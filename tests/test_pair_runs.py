"""Pairs in whole runs: every method, clients that hold one modality, means over those who sent an array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, company, execute, final_arrays, tiny
from test_pairs import SHAPE, VIEWS, generator, pair, table

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, ProtocolError
from fedssl.export import load_encoder
from fedssl.gradient import PlainGradient, cached_backward
from fedssl.job.setup import build_model, untrained
from fedssl.measures import retrieval
from fedssl.method import Batch, Step
from fedssl.modalities.pairs import Pair
from fedssl.model import load_arrays, to_arrays
from fedssl.report import finish_report
from fedssl.tree import ExactMean, PartialMean

STEP = Step(round=1, rounds=10, step=0, steps=5)
DRAWN = ((1, 8, 8), (1, 8, 8))
PAIRED = (
    "data=synthetic_pairs",
    "data.size=8",
    "data.train=60",
    "data.test=30",
    "data.classes=3",
    "encoder.first.width=4",
    "encoder.second.width=4",
    "encoder.first.dim=8",
    "encoder.second.dim=8",
)


def options_for(method: str, *overrides: str) -> list[str]:
    """A tiny run of pairs."""
    base = [o for o in tiny(f"method={method}") if not o.startswith(("data", "encoder", "public"))]
    return [*base, *PAIRED, *company(method, PAIRED), *overrides]


def paired_plan(tmp_path: Path, method: str, *overrides: str, name: str = "run") -> Plan:
    return config.compose(options_for(method, f"out={tmp_path}", f"name={name}", *overrides))


# --- partial means


def test_partial_means_by_hand() -> None:
    now = {"a": np.zeros(2, np.float32), "b": np.array([8.0], np.float32), "n": np.array(3)}
    updates: list[tuple[dict[str, np.ndarray], int]] = [
        ({"a": np.array([1, 2], np.float32), "b": np.array([4], np.float32)}, 1),
        ({"a": np.array([4, 8], np.float32)}, 3),
        ({"b": np.array([1], np.float32)}, 2),
    ]
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        mean = PartialMean(now)
        for i in order:
            mean.add(*updates[i])
        assert (mean.weight, mean.count) == (6, 3)
        results.append(mean.result())
        assert_same(results[0], results[-1])
    assert results[0]["a"].tolist() == [(1 + 12) / 4, (2 + 24) / 4]
    assert results[0]["b"].tolist() == [(4 + 2) / 3]
    assert results[0]["n"] == 3, "nobody sent it"
    assert not np.shares_memory(results[0]["n"], now["n"])


def test_a_partial_mean_of_whole_updates_is_the_exact_mean() -> None:
    rng = np.random.default_rng(0)
    now = {"a": rng.normal(size=(3, 4)).astype(np.float32), "n": np.array([3, 5])}
    whole, each = ExactMean(), PartialMean(now)
    for weight in (3, 1, 17):
        update = {"a": rng.normal(size=(3, 4)).astype(np.float32), "n": rng.integers(0, 9, 2)}
        whole.add(update, weight)
        each.add(update, weight)
    assert_same(whole.result(now), each.result())


def test_what_a_partial_mean_refuses() -> None:
    mean = PartialMean({"a": np.zeros(2)})
    with pytest.raises(ProtocolError, match="nothing to merge"):
        mean.result()
    with pytest.raises(ProtocolError, match="'b' that is not of this model"):
        mean.add({"b": np.zeros(2)}, 1)
    with pytest.raises(ProtocolError, match="weight"):
        mean.add({"a": np.zeros(2)}, 0)
    mean.add({"a": np.zeros(2)}, 1)
    with pytest.raises(ProtocolError):
        mean.add({"a": np.zeros(3)}, 1)


def test_what_a_client_cannot_train_is_left_out_of_its_teacher_too() -> None:
    keys = ("encoder.first.w", "encoder.second.w", "teacher.encoder.second.w", "projector.encoder.w", "second.w")
    data = type("Loaded", (), {"train": table(holds=("both", "first"))})()
    assert untrained(data, 0, keys) == frozenset()
    assert untrained(data, 1, keys) == {"encoder.second.w", "teacher.encoder.second.w"}
    images = type("Loaded", (), {"train": config.compose([]).job.data.load().train})()
    assert untrained(images, 1, keys) == frozenset()


# --- whole runs


@pytest.mark.parametrize("method", config.options_of("method"))
def test_every_method_trains_on_pairs(method: str, tmp_path: Path) -> None:
    options = options_for(method, f"out={tmp_path}", "name=run", "federation.rounds=1")
    try:
        plan = config.compose(options)
    except ConfigError as error:
        assert "makes no sense on pairs" in str(error) or "local_views" in str(error)  # noqa: PT017
        if "local_views" not in str(error):
            return
        plan = config.compose([*options, "method.local_views=0"])
    before = to_arrays(build_model(plan.job, DRAWN))
    point = execute(plan).latest()
    assert point is not None
    after = point.arrays | {key.removeprefix("learnt/"): value for key, value in point.strategy[0].items()}
    moved = {key.partition(".")[2].partition(".")[0] for key in after if (after[key] != before[key]).any()}
    assert {"first", "second"} <= moved


def test_clip_of_two_towers_is_its_loss_of_both_projections() -> None:
    from fedssl.losses import info_nce

    job = config.compose(options_for("clip", "method.norm=none")).job
    model = build_model(job, SHAPE)
    views = VIEWS.views(pair(), generator(), 2)
    out = job.method.loss(model, Batch(views, torch.arange(5)), STEP)
    a, b = (model["projector"](model["encoder"](view)) for view in views)
    expected = (info_nce(a, b, temperature=0.1) + info_nce(b, a, temperature=0.1)).mean() / 2
    torch.testing.assert_close(out.loss, expected)
    assert out.per_example is None
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model["encoder"].parameters())


def test_gradient_caching_cuts_sides() -> None:
    job = config.compose(options_for("clip", "method.norm=none")).job
    whole, cut = build_model(job, SHAPE), build_model(job, SHAPE)
    batch = Batch(VIEWS.views(pair(7), generator(), 2), torch.arange(7))
    job.method.loss(whole, batch, STEP).loss.backward()
    cached_backward(job.method, cut, batch, STEP, 3)
    for (name, p), q in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_clients_with_one_modality_train_their_tower_and_leave_the_other_alone(tmp_path: Path) -> None:
    """Three clients: both, first, second. The merged towers are the means over those who trained them."""
    options = ("data.holds=[both,first,second]", "federation.rounds=1", "evaluate.every=1", "evaluate.final=true")
    plan = paired_plan(tmp_path, "clip", *options, "evaluate.repeats=1")
    rundir = execute(plan)
    merged = final_arrays(rundir)
    rows = rundir.rows("clients.jsonl")
    sizes = {k: sum(v.nbytes for key, v in merged.items() if key.startswith(k)) for k in ("encoder.first", "encoder.s")}
    total = sum(v.nbytes for v in merged.values())
    assert [row["bytes_up"] for row in rows] == [total, total - sizes["encoder.s"], total - sizes["encoder.first"]]

    from fedssl.client import fit
    from fedssl.job.shards import shard_of

    job, device = plan.job, torch.device("cpu")
    initial = build_model(job, DRAWN)
    trained, weights = [], []
    for client in range(3):
        model = build_model(job, DRAWN)
        shard = shard_of(job, client, device)
        args = {"gradient": PlainGradient(), "round": 1, "rounds": 1, "seed": job.seed, "client": client}
        fit(job.method, model, shard, job.data.augment, job.local, **args)
        trained.append(to_arrays(model))
        weights.append(len(shard))
    senders = {"encoder.first": (0, 1), "encoder.second": (0, 2), "projector": (0, 1, 2)}
    for start, who in senders.items():
        keys = [key for key in merged if key.startswith(start)]
        assert keys
        for key in keys:
            expected = sum(weights[i] * trained[i][key].astype(np.float64) for i in who) / sum(weights[i] for i in who)
            expected = expected if np.issubdtype(merged[key].dtype, np.floating) else np.rint(expected)
            np.testing.assert_allclose(merged[key], expected, rtol=1e-6, atol=1e-9, err_msg=key)
    for key, value in to_arrays(initial).items():
        for client, start in ((1, "encoder.second"), (2, "encoder.first")):
            if key.startswith(start):
                assert (trained[client][key] == value).all()
    probes = rundir.read("probes.json")["probes"]["federated"]
    names = {key for key, _ in retrieval.PROBES}
    assert {f"{name}_accuracy" for name in names} <= probes.keys()
    assert all(0 <= probes[f"{name}_accuracy"] <= 1 for name in names)
    assert "retrieval, first to second" in finish_report(rundir).read_text()


def test_a_tower_that_nobody_trains_stays_as_it_is(tmp_path: Path) -> None:
    plan = paired_plan(tmp_path, "byol", "data.holds=[first]", "strategy.share={teacher: merge}")
    merged = final_arrays(execute(plan))
    before = to_arrays(build_model(plan.job, DRAWN))
    still = [key for key in merged if "encoder.second" in key]
    assert any(key.startswith("teacher.") for key in still)
    assert_same({key: merged[key] for key in still}, {key: before[key] for key in still})
    assert any((merged[key] != before[key]).any() for key in merged if key.startswith("teacher.encoder.first"))


@pytest.mark.parametrize("strategy", ["fedadam", "fedmedian"])
def test_stock_strategies_take_whole_models_only(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client 1 lacks a modality .* strategy=fedavg"):
        execute(paired_plan(tmp_path, "clip", f"strategy={strategy}", "data.holds=[both,second]"))
    rundir = execute(paired_plan(tmp_path, "clip", f"strategy={strategy}", "federation.rounds=1", name="whole"))
    assert rundir.done


def test_an_update_that_lacks_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedssl.flower import client_app

    genuine = client_app.untrained
    monkeypatch.setattr(client_app, "untrained", lambda *a: genuine(*a) | {"projector.0.weight"})
    with pytest.raises(ProtocolError, match=r"client 0 sent other arrays .*'projector.0.weight'"):
        execute(paired_plan(tmp_path, "clip", "data.holds=[both,first]"))


def test_workers_and_a_kill_do_not_matter_to_partial_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_laws import interrupted, metrics

    options = ("data.holds=[both,first,second]", "evaluate.every=1", "federation.rounds=3")
    runs = [execute(paired_plan(tmp_path, "clip", *options, f"engine.workers={w}", name=f"w{w}")) for w in (1, 3)]
    assert_same(final_arrays(runs[0]), final_arrays(runs[1]))
    interrupted(paired_plan(tmp_path, "clip", *options, name="broken"), 1, monkeypatch)
    resumed = execute(paired_plan(tmp_path, "clip", *options, name="broken"))
    assert_same(final_arrays(runs[0]), final_arrays(resumed))
    assert metrics(runs[0]) == metrics(resumed)


def test_the_encoder_comes_back_for_pairs_and_for_one_modality(tmp_path: Path) -> None:
    plan = paired_plan(tmp_path, "clip", "federation.rounds=1")
    rundir = execute(plan)
    loaded = load_encoder(rundir.path)
    data = plan.job.data.load().test
    model = build_model(plan.job, data.shape)
    load_arrays(model, final_arrays(rundir))
    batch = data.batch(torch.arange(4))
    with torch.inference_mode():
        got = loaded(batch)
        assert got.shape == (4, loaded.dim) == (4, 8)
        torch.testing.assert_close(got, model["encoder"](plan.job.data.augment.plain(batch)))
        parts = [loaded(Pair(batch.first, None)), loaded(Pair(None, batch.second))]
        torch.testing.assert_close(got, (parts[0] + parts[1]) / 2)
