"""Reports and figures, from run directories whose JSON files are written by hand: nothing is trained here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedssl.errors import ConfigError, ResumeError
from fedssl.report import comparison, figures, finish_report, page, record, run_figures, split_figures
from fedssl.report.checks import collapse_checks
from fedssl.rundir import RunDirectory

Make = Callable[..., RunDirectory]
PROBE = {
    "linear_accuracy": 0.913,
    "knn_accuracy": 0.882,
    "one_label_accuracy": 0.654,
    "one_label_std": 0.021,
    "five_labels_accuracy": 0.777,
    "five_labels_std": 0.011,
}
HEALTHY = {
    "rankme": 5.1,
    "effective_rank": 5.05,
    "feature_std": 0.3,
    "uniformity": -2.1,
    "alignment": 0.2,
}
COLLAPSED = {"rankme": 1.0, "effective_rank": 1.0, "feature_std": 0.003, "uniformity": -0.02, "alignment": 0.0}


def config(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "seed": 0,
        "name": "x",
        "federation": {"clients": 3, "rounds": 4},
        "method": {"_target_": "fedssl.methods.simclr.SimCLR", "temperature": 0.5},
        "strategy": {"_target_": "strategies.fedavg.FedAvg"},
        "partition": {"_target_": "fedssl.partition.Dirichlet", "alpha": 0.3},
        "data": {"_target_": "fedssl.datasets.digits.Digits"},
        "encoder": {"_target_": "fedssl.modalities.encoders.Conv4", "dim": 8},
    }
    return tree | changes


def write(
    root: Path,
    name: str = "run",
    *,
    labelled: bool = True,
    baselines: bool = True,
    done: bool = True,
    rounds: int = 4,
    features: dict[str, float | None] = HEALTHY,
    linear: float = 0.913,
    epsilon: float | None = None,
    **changes: Any,
) -> RunDirectory:
    """A run directory."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**changes)))
    rows: list[dict[str, Any]] = []
    for at in range(1, rounds + 1):
        row = {"round": at, "loss": 4.5 - 0.3 * at, "bytes_up": 1_500_000, "bytes_down": 2_000_000, "seconds": 1.5}
        if at % 2 == 0:
            row |= features | {"client_rankme": 4.0, "client_feature_std": 0.2, "client_cka": 0.9}
            if labelled:
                row |= {"knn_accuracy": 0.8 + 0.02 * at, "client_knn_accuracy": 0.79, "merge_gap_knn": 0.05}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split: dict[str, Any] = {"sizes": [10, 20, 30]}
    if labelled:
        split |= {"classes": ["cat", "<b>dog</b>"], "counts": [[10, 0], [10, 10], [0, 30]]}
    heterogeneity: dict[str, Any] = {"fingerprint": "ab" * 32, "gini": 0.222, "smallest": 10.0, "largest": 30.0}
    manifest = {
        "fedssl": "0.1.0",
        "device": "cpu",
        "split": heterogeneity | ({"label_emd": 0.417} if labelled else {}),
    }
    files: dict[str, Any] = {"split.json": split, "manifest.json": manifest}
    if done:
        spectra = {"federated": np.geomspace(2, 1e-3, 8).tolist(), "random encoder": [1.0] * 7 + [0.0]}
        mine = PROBE | {"linear_accuracy": linear} if labelled else {}
        others = {
            "random encoder": {k: v / 2 for k, v in PROBE.items()},
            "central": PROBE,
        }
        probes = {"federated": mine, **(others if labelled and baselines else {})}
        chance = {f"random_encoder_{k}": v / 2 for k, v in PROBE.items()} if labelled and baselines else {}
        central = {f"central_{k}": v for k, v in PROBE.items()} if labelled and baselines else {}
        files["probes.json"] = {"probes": probes, "spectra": spectra}
        files["summary.json"] = {
            **{"rounds": rounds, "loss": 3.3125, "epsilon": epsilon, "seconds": 754.0},
            **{"bytes_up": 6_250_000, "bytes_down": 8_750_000},
            **{"knn_accuracy": None, "linear_accuracy": None, **features, **mine, **chance, **central},
        }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return RunDirectory(folder)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a run directory into the folder of this test."""
    return partial(write, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with its report."""
    run = write(tmp_path_factory.mktemp("finished"))
    finish_report(run)
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take a second a run."""
    monkeypatch.setattr(run_figures, "write", lambda record: [])


def read(path: Path) -> str:
    """The page, which must ask nothing of anybody."""
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", html)
    assert "http://" not in html
    assert "https://" not in html
    assert "<script" not in html
    return html


def test_a_page_shows_the_numbers_of_the_summary(finished: RunDirectory) -> None:
    html = read(finished.path / "report.html")
    summary = finished.read("summary.json")
    few, linear, knn = (100 * summary[f"{key}_accuracy"] for key in ("one_label", "linear", "knn"))
    for shown in (
        f"<b>{few:.1f} ± {100 * summary['one_label_std']:.1f} %</b>",
        f"<b>{linear:.1f} %</b>",
        f"<b>{knn:.1f} %</b>",
        f"<b>{summary['rounds']}</b>",
        f"<td>{100 * summary['random_encoder_linear_accuracy']:.1f}</td>",
        "<b>3.312</b>",
        f"<b>{summary['effective_rank']:.1f} of 8</b>",
        "<b>6.2 MB</b>",
        "<b>8.8 MB</b>",
        "<b>12 min 34 s</b>",
        "<b>no privacy claimed</b>",
        "0.417",
        "0.222",
        "abababab",
        "gets 65.4 % of the test examples right: 32.7 points above a random encoder, level with central training.",
    ):
        assert shown in html, shown
    assert "Alarm" not in html
    assert html.count("Healthy: ") == 3
    assert "<b>dog</b>" not in html
    assert html.count("<img ") == 6


@pytest.mark.usefixtures("undrawn")
def test_epsilon_is_shown_when_there_is_one(make: Make) -> None:
    html = read(finish_report(make(epsilon=3.456)))
    assert "<b>ε = 3.46</b>" in html
    assert "no privacy claimed" not in html


def test_figures_are_there_and_the_same_twice(finished: RunDirectory) -> None:
    names = ("few_labels", "probes", "loss", "collapse", "spectrum", "split")
    before = {p.name: p.read_bytes() for p in (finished.path / "figures").iterdir()}
    assert before.keys() == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert {p.name: p.read_bytes() for p in run_figures.write(record.Record.read(finished))} == before
    assert all(before[f"{name}.png"].startswith(b"\x89PNG") for name in names)
    assert not any(b"<dc:date>" in content for content in before.values())


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.image(run_figures.loss_curve([{"round": 1, "loss": 2.0}]), "pdf")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (2, 100), (100, 100), (20, 20)])
def test_splits_of_every_size_are_drawn(clients: int, classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 5, (clients, classes))
    names = ["$\\frac$", "猫", "_x"] * classes
    split = {"sizes": counts.sum(1).tolist(), "classes": names[:classes], "counts": counts.tolist()}
    assert len(figures.image(split_figures.split_picture(split), "png")) > 1000


@pytest.mark.usefixtures("undrawn")
def test_names_and_values_are_escaped(make: Make) -> None:
    bad = "<script>alert('x')</script>"
    name = bad.replace("/", "")
    run = make(name, partition={"_target_": bad, "alpha": bad}, data={"_target_": f"a.{bad}", '"><img src=x>': bad})
    html = read(finish_report(run))
    assert "&lt;script&gt;alert(" in html
    assert "<img src=x" not in html
    assert comparison.compare([run], run.path / "compare.html").read_text().count("&lt;script&gt;") > 1


@pytest.mark.usefixtures("undrawn")
def test_a_collapsed_run_raises_the_alarm(make: Make) -> None:
    html = read(finish_report(make(features=COLLAPSED)))
    assert html.count("Alarm, complete collapse: ") == 2
    assert "<b>Alarm since round 4: complete collapse (encoder). </b>" in html
    assert "Likely cause: " in html
    assert "Use a contrastive or decorrelating method" in html


@pytest.mark.usefixtures("undrawn")
def test_dimensional_collapse_and_divergence_are_told_apart(make: Make) -> None:
    encoder = {"_target_": "x.Y", "dim": 512}
    few = record.Record.read(make("few", features=HEALTHY | {"feature_std": 0.04}, done=False, encoder=encoder))
    assert [check.alarm for check in collapse_checks(few)] == ["", "", "dimensional collapse", "", ""]
    diverged = make("diverged", features=dict.fromkeys(HEALTHY, None))
    alarms = {check.alarm for check in collapse_checks(record.Record.read(diverged))}
    assert alarms == {"divergence", ""}
    assert "Lower local.lr" in read(finish_report(diverged))


def test_an_unfinished_run_shows_what_there_is(make: Make) -> None:
    run = make(done=False, rounds=3)
    html = read(finish_report(run))
    assert "Not finished: 3 of 4 rounds so far." in html
    assert "<b>4.5 MB</b>" in html
    assert "<b>84.0 %</b>" in html
    assert html.count("<img ") == 4


def test_a_run_of_one_round_without_labels_is_reported(make: Make) -> None:
    run = make(labelled=False, rounds=1)
    html = read(finish_report(run))
    assert "with no labels to measure it on: loss 3.312" in html
    assert "kNN accuracy" not in html
    assert "label EMD" not in html
    assert not (run.path / "figures" / "probes.svg").exists()
    assert comparison.table([run])[1][4:8] == [page.NOTHING] * 4


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_baselines_is_reported(make: Make) -> None:
    html = read(finish_report(make(baselines=False)))
    assert "gets 65.4 % of the test examples right." in html
    assert "baselines=true" in html


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_rounds_is_refused(make: Make, tmp_path: Path) -> None:
    run = make(rounds=0, done=False)
    with pytest.raises(ResumeError, match="no finished round"):
        finish_report(run)
    with pytest.raises(ResumeError, match="not a run directory"):
        finish_report(RunDirectory(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no run"):
        comparison.table([])


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (page.percent(0.7165, 0.0269), "71.7 ± 2.7 %"),
        (page.percent(None), page.NOTHING),
        (page.percent(float("nan")), page.NOTHING),
        (page.decimal(-1.404, 2), f"{page.MINUS}1.40"),
        (page.megabytes(123_161_600), "123.2 MB"),
        (page.duration(16.29), "16.3 s"),
        (page.duration(7530), "2 h 05 min"),
        (page.text("<&\"'"), "&lt;&amp;&quot;&#x27;"),
    ],
)
def test_numbers_have_units(shown: str, expected: str) -> None:
    assert shown == expected
