"""The two studies of federations, noniid and collapse: tiny runs, and every part of them by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedssl import config, seeds
from fedssl.errors import ConfigError
from fedssl.intervals import Interval, both, difference
from fedssl.job.setup import build_model
from fedssl.method import Batch, Sizes, Step
from fedssl.methods.byol import BYOL
from fedssl.report import charts
from fedssl.report.charts import Line, Panel
from simulations import study
from simulations.studies.base import Bench
from simulations.studies.collapse import Collapse
from simulations.studies.federated.ablations import FreeBYOL
from simulations.studies.federated.cells import Cell, cross, partition, star
from simulations.studies.federated.collapsing import History
from simulations.studies.federated.failures import CASES, FAILURE, HEALTHY, REMEDY
from simulations.studies.federated.measures import Probed, distributions, for_clients, own_arrays
from simulations.studies.federated.results import Results, columns
from simulations.studies.federated.supervised import HEAD, Baseline
from simulations.studies.noniid import NonIID

FEWER = "data.test_fraction=0.7"  # 539 digits to train with
SMALLER = {
    "noniid": (FEWER, "study.methods=[byol]"),
    "collapse": (FEWER, "study.seeds=2", "study.rounds=4", "study.every=4", "study.clients=2"),
}


@pytest.fixture(scope="module", params=["noniid", pytest.param("collapse", marks=pytest.mark.slow)])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A study that has run, and its folder."""
    name, out = request.param, tmp_path_factory.mktemp("studies")
    assert study.main([name, "study.tiny=true", f"study.out={out}", *SMALLER[name]]) == 0
    return name, out / f"{name}-tiny"


def test_a_study_leaves_findings_table_and_figures(done: tuple[str, Path]) -> None:
    name, folder = done
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert summary["study"]["tiny"] is True
    assert len(summary["findings"]) >= 4
    for finding in summary["findings"]:
        assert finding["holds"] in (True, False, None)
        assert re.search(r"\d", finding["found"]), finding
        assert not re.search(r"\b(nan|inf)\b", finding["found"]), finding
    several = summary["study"]["seeds"] > 1
    for row in summary["table"]:
        assert list(row) == ["part", "place", "setting", "measure", "mean", "deviation", "low", "high"]
        assert math.isfinite(row["mean"])
        assert several or row["low"] is None
        if row["low"] is not None:  # baselines that no seed changes have one value and no interval
            assert row["low"] - 1e-12 <= row["mean"] <= row["high"] + 1e-12
    assert (folder / "table.md").read_text().count("\n") == len(summary["table"]) + 2
    pictures = list((folder / "figures").glob("*.png"))
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5, "an empty picture"
    {"noniid": noniid, "collapse": collapse}[name](summary, folder)


def value(summary: dict[str, Any], **wanted: str) -> float:
    """The mean of the one row with these entries."""
    (found,) = [row["mean"] for row in summary["table"] if all(row[key] == text for key, text in wanted.items())]
    return float(found)


def noniid(summary: dict[str, Any], folder: Path) -> None:
    settings = {(row["setting"], row["place"]) for row in summary["table"]}
    assert ("byol, fedbyol", "2 classes, 5 clients") in settings
    assert ("byol, fedbyol", "iid, 5 clients") in settings
    own = {row["setting"] for row in summary["table"] if row["measure"] == "own encoders, mean"}
    assert own == {"byol, fedbn"}, "the others keep nothing of the encoder at home"
    even, skewed = (value(summary, setting="supervised", place=place, measure=HEAD) for place in ("iid", "2 classes"))
    assert even > skewed, "a head suffers from clients that lack classes"
    for worst in (row for row in summary["table"] if row["measure"] == "clients, worst"):
        mean = value(summary, setting=worst["setting"], place=worst["place"], measure="clients, mean")
        assert worst["mean"] <= mean


def collapse(summary: dict[str, Any], folder: Path) -> None:
    healthy, failing = (
        value(summary, setting=name, measure="effective rank of projections")
        for name in ("SimSiam", "no stop-gradient")
    )
    assert failing < healthy
    claims = {finding["claim"] for finding in summary["findings"]}
    assert "SimSiam, no stop-gradient: collapses" in claims
    assert any("alarm" in claim for claim in claims)


def test_intervals_by_hand() -> None:
    three = Interval.of([1.0, 2.0, 3.0])
    assert three.mean == 2
    assert three.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)  # t = 4.303 with 2 degrees of freedom, s = 1
    assert Interval.of([0.0, 1.0]).half == pytest.approx(12.706 / 2)  # s = sqrt(1/2), n = 2
    assert Interval.of([0.0] * 12 + [1.0] * 12).half == pytest.approx(2.086 * math.sqrt(6 / 23 / 24))  # t of 20
    assert Interval.of([5.0]).half == math.inf
    assert Interval.of([5.0]).bar == (5.0, 0.0)
    assert Interval.of([5.0]).above(-100) is None
    assert (three.above(-1), three.above(5), three.above(1)) == (True, False, None)
    assert difference([3.0, 5.0], [2.0, 4.0]) == Interval(1.0, 0.0), "paired: what both seeds share cancels"
    assert (Interval(0.8, 0.1).text(100, 1), Interval(0.8, math.inf).text(sign=True)) == ("80.0 ± 10.0", "+0.800")
    assert (both([True, None]), both([False, None]), both([True, True])) == (None, False, True)


def test_cells_are_a_star_and_a_cross() -> None:
    centre = Cell("byol", "fedavg", "2 classes", 10)
    found = star(centre, ["byol", "simclr"], ["fedavg", "fedu"], ["iid", "2 classes"], [5, 10])
    assert len(found) == 5, "the centre once, and one for each other word"
    assert all(sum(vars(cell)[key] != vars(centre)[key] for key in vars(centre)) == 1 for cell in found[1:])
    assert len(cross(["byol"], ["fedavg", "fedu"], ["iid", "1 class"], [5, 10])) == 8
    assert (replace(centre, clients=5).count, replace(centre, clients=5, skew="1 class").count) == (5, 10)
    assert partition("1 class") == ("partition=pathological", "partition.classes_per_client=1")
    assert partition("dirichlet 0.1") == ("partition=dirichlet", "partition.alpha=0.1")
    assert partition("quantity_skew") == ("partition=quantity_skew",)
    with pytest.raises(ConfigError, match="N classes"):
        partition("few classes")
    assert len(replace(NonIID(), full=True).cells) == 4 * 7 * 4 * 3
    for cell in NonIID(crossed=("fedavg",)).cells:  # every word once
        config.compose(NonIID().options(cell)).job.check()


def test_every_case_has_its_twin_and_composes() -> None:
    for name, case in CASES.items():
        config.compose(Collapse().options(case)).job.check()
        assert CASES[case.family].kind == HEALTHY
        if case.kind == FAILURE:
            assert CASES[case.twin].kind != REMEDY, name
        if case.kind == REMEDY:
            assert CASES[case.twin].kind == FAILURE, name


def test_clients_get_accuracies_by_their_own_labels() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    shares = distributions([np.array([0, 1]), np.array([1, 2, 3, 4])], labels, 3)
    assert shares.tolist() == [[1, 0, 0], [0.25, 0.5, 0.25]]
    assert for_clients(np.array([1.0, 0.5, 0.0]), shares).tolist() == [1.0, 0.5]
    each = np.array([[0.25, 1, 1], [0, 0, 1]])
    assert for_clients(each, shares).tolist() == [0.25, 0.25], "a row of its own for each client"


def test_recalls_are_accuracies_by_class() -> None:
    rng = seeds.stream(0, "test")
    corners = np.eye(3, 8, dtype=np.float32)
    labels, held = rng.integers(0, 3, 300), rng.integers(0, 3, 150)
    near = Probed(corners[labels], corners[held], labels, held, 0)
    assert near.recalls(4).tolist() == [1, 1, 1]
    noise = [rng.standard_normal((len(y), 8)).astype(np.float32) for y in (labels, held)]
    lost = Probed(noise[0], np.where((held == 2)[:, None], noise[1], corners[held]), labels, held, 0)
    first, second, third = Probed(corners[labels], lost.test, labels, held, 0).recalls(4)
    assert first == second == 1 > third
    assert near.accuracies()["5 labels a class"] == 1


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """Supervised FedAvg on IID clients."""
    plan = config.compose(["device=cpu", "partition=iid", "federation.clients=4", "federation.rounds=3"])
    return Baseline(plan.job, tmp_path_factory.mktemp("supervised"))


def test_the_supervised_baseline_learns_and_chooses_its_rate(baseline: Baseline) -> None:
    rates = (1e-6, 0.005)
    assert baseline.best(rates) == 0.005
    good, none = (baseline.measured(rate)[HEAD] for rate in (0.005, 1e-6))
    assert good > 0.5 > none
    files = {path: path.stat().st_mtime_ns for path in baseline.folder.iterdir()}
    assert len(files) == 4, "two rates on a part, two on all"
    assert baseline.best(rates) == 0.005
    assert {path: path.stat().st_mtime_ns for path in baseline.folder.iterdir()} == files, "nothing is trained twice"


def test_the_baseline_takes_as_many_steps_as_any_client_from_the_same_weights(baseline: Baseline) -> None:
    job, data = baseline.job, baseline.data
    mine, theirs = baseline._model(), build_model(job, data.train.shape)
    for key, tensor in mine["encoder"].state_dict().items():
        assert torch.equal(tensor, theirs["encoder"].state_dict()[key])
    method = baseline._method(baseline.shards[0])
    assert method.labels.tolist() == data.train.targets[baseline.shards[0]].tolist()
    with torch.no_grad():
        loss = method.loss(mine, Batch([data.train.batch(torch.arange(2))], torch.tensor([1, 0])), Step(1, 1, 0, 1))
    said = mine["head"](mine["encoder"](data.train.batch(torch.arange(2)))).log_softmax(1).detach()
    assert loss.loss.item() == pytest.approx(
        -float(said[0, method.labels[1]] + said[1, method.labels[0]]) / 2, rel=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [("partition=pathological", "partition.classes_per_client=1"), ("partition=dirichlet", "partition.alpha=0.05")],
)
def test_the_baseline_refuses_no_split(options: tuple[str, ...], tmp_path: Path) -> None:
    plan = config.compose(["device=cpu", "federation.clients=10", "federation.rounds=1", *options])
    found = Baseline(plan.job, tmp_path).measured(0.002)
    assert 0 <= found["clients, worst"] <= found["clients, mean"] <= 1


def test_own_encoders_are_what_clients_keep(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    options = ("device=cpu", "evaluate.every=0", "evaluate.final=false", "federation.clients=2", "federation.rounds=1")
    kept = {name: own_arrays(bench.pretrain(*options, f"strategy={name}"), 2) for name in ("fedavg", "fedbn", "fedema")}
    assert kept["fedavg"] == []
    assert all("norm" in key or "weight" in key or "bias" in key for key in kept["fedbn"][0])
    assert len(kept["fedema"][0]) > len(kept["fedbn"][0]) > 0
    assert any(not np.array_equal(a, kept["fedbn"][1][key]) for key, a in kept["fedbn"][0].items())


def test_free_byol_pulls_both_views_together() -> None:
    sizes = Sizes(8, 0, (1, 8, 8))
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
    views = [torch.randn(6, 1, 8, 8, generator=seeds.torch_stream(0, "view", i)) for i in range(2)]
    batch, step = Batch(views, torch.arange(6)), Step(1, 1, 0, 1)
    bound, free = BYOL(norm="none").init(encoder, sizes), FreeBYOL(norm="none").init(encoder, sizes)
    assert set(free) == {"encoder", "projector", "predictor"}
    for part in free:
        free[part].load_state_dict(bound[part].state_dict())
    bound["teacher"].get_submodule("projector").load_state_dict(bound["projector"].state_dict())
    stopped, both_ways = (
        m.loss(model, batch, step).loss for m, model in ((BYOL(norm="none"), bound), (FreeBYOL(norm="none"), free))
    )
    assert both_ways.item() == pytest.approx(stopped.item(), rel=1e-5), "before training the teacher is the student"
    grads = [
        torch.autograd.grad(loss, list(model["projector"].parameters()))
        for loss, model in ((stopped, bound), (both_ways, free))
    ]
    assert not torch.allclose(grads[0][0], grads[1][0])


def test_results_are_paired_and_leave_out_what_was_not_measured() -> None:
    results = Results({"a": columns([{"x": 1.0, "y": 2.0}, {"x": 3.0}]), "b": {"x": [0.0, 2.0]}})
    assert results.values["a"] == {"x": [1.0, 3.0]}
    assert results.gain("a", "b", "x") == Interval(1.0, 0.0)
    assert results.bars({"A": "a", "B": "b", "C": "c"}, "x").keys() == {"A", "B"}
    (row, _) = results.rows("part", str, str)
    assert (row["mean"], row["low"]) == (2, pytest.approx(2 - 12.706))


def test_a_history_shows_the_first_and_the_last_round() -> None:
    history = History(range(0, 18, 2), [1.0] * 9, [[1.0, 0.5, 0.0]] * 9)
    curves = history.curves()
    assert list(curves) == ["round 0", "round 2", "round 4", "round 8", "round 16"]
    assert list(curves["round 0"].x) == [1, 2], "zeros have no place on a logarithmic axis"


def test_panels_stand_side_by_side() -> None:
    line = {"one": Line([0, 1], [0.0, 1.0]), "two": Line([0, 1], [1.0, 0.0])}
    left, right = Panel("x", "y", line, shaded=True, title="left"), Panel("x", "y", line, shaded=True, title="right")
    figure = charts.chart([[left, right], [left, Panel("x", "z", {"one": line["one"], "else": line["two"]})]])
    assert figure.get_figwidth() > charts.chart([left]).get_figwidth()
    first, second, third, fourth = figure.get_axes()
    assert first.get_ylim() == second.get_ylim()
    assert [len(part.legends) for part in figure.subfigs] == [1, 0], "equal names share a legend"
    assert all(axes.get_legend() is None for axes in (first, second))
    assert all(axes.get_legend() is not None for axes in (third, fourth))
    assert first.lines[0].get_color() != first.lines[1].get_color()


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_the_yaml_says_how_long_it_takes(name: str) -> None:
    second = (config.conf_dir() / "study" / f"{name}.yaml").read_text().splitlines()[1]
    assert re.fullmatch(rf"# Full size: fedssl study {name} \((about [1-9]\d* min on two cores|not run yet)\)", second)
