"""Several runs side by side, from run directories whose JSON files are written by hand: nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_report import Make, make, read

from fedssl.report import comparison, figures, page
from fedssl.report.configurations import configurations
from fedssl.report.record import Record
from fedssl.rundir import RunDirectory
from simulations import cli

__all__ = ["make"]  # a fixture


def three_seeds(make: Make) -> list[RunDirectory]:
    runs = [make(f"s{seed}", seed=seed, linear=0.9 + 0.01 * seed) for seed in range(3)]
    runs.append(make("late", seed=3, done=False))
    runs.append(make("byol", method={"_target_": "fedssl.methods.byol.BYOL", "decay": 0.99}, linear=0.8, epsilon=3.456))
    (runs[-1].path / "privacy.json").write_text(
        json.dumps({"unit": "client", "epsilon": 3.456, "delta": 1e-5, "says": "each client is hidden"})
    )
    return runs


def test_seeds_of_one_configuration_are_summed_up_with_their_interval(make: Make, tmp_path: Path) -> None:
    runs = three_seeds(make)
    rows = comparison.table([*runs, runs[0]])
    assert [row[0] for row in rows] == ["run", "s0", "s1", "s2", "late", "mean of 3 runs", "byol"]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert rows[5][4] == "91.0 ± 2.5", "the quantile of Student's t for two degrees of freedom, 4.303, over root 3"
    assert rows[5][1] == "SimCLR"
    assert rows[4][3:5] == ["4 of 4", page.NOTHING]
    told = dict(zip(rows[0], rows[6], strict=True))
    assert (told["MB up"], told["MB down"], told["epsilon"]) == ("6.2", "8.8", "3.46 (client, δ 1e-05)")
    html = read(comparison.compare(runs, tmp_path / "compare.html"))
    assert "5 runs of 2 configurations: best linear probe 91.0 %, SimCLR (3 runs)." in html
    assert "91.0 ± 2.5" in html
    assert "method.decay" in html
    assert "partition.alpha" not in html
    assert "each client is hidden" in html
    for part in ("By labels", "By round", "Spectra", "Splits"):
        assert f"<h2>{part}</h2>" in html
    assert html.count("<img ") == 5, "accuracies, two curves, spectra, and the split, which all share"


def test_labels_say_what_differs(make: Make) -> None:
    simclr, byol = ({"_target_": f"fedssl.methods.x.{name}"} for name in ("SimCLR", "BYOL"))
    iid, skewed = {"_target_": "x.IID"}, {"_target_": "x.Dirichlet", "min_size": 2}
    runs = [
        make("a", method=simclr | {"temperature": 0.1}, partition=iid),
        make("b", method=simclr | {"temperature": 0.5}, partition=skewed | {"alpha": 0.1}),
        make("c", method=byol, partition=skewed | {"alpha": 1.0}),
        make("d", method=byol, partition=skewed | {"alpha": 1.0}, local={"lr": 0.1}, seed=1),
    ]
    assert [one.label for one in configurations(runs)] == [
        f"SimCLR(temperature=0.1) · IID · lr={page.NOTHING}",
        f"SimCLR(temperature=0.5) · Dirichlet(alpha=0.1) · lr={page.NOTHING}",
        f"BYOL · Dirichlet(alpha=1.0) · lr={page.NOTHING}",
        "BYOL · Dirichlet(alpha=1.0) · lr=0.1",
    ]
    assert [one.label for one in configurations([runs[0], make("e", note="x" * 99)])] == ["a", "e"], "too long"


def test_one_run_can_be_compared_with_nothing(make: Make, tmp_path: Path) -> None:
    html = read(comparison.compare([make()], tmp_path / "compare.html"))
    assert "1 run of 1 configuration" in html
    assert "Where they differ" not in html
    assert "<h2>Privacy</h2>" not in html


def test_different_splits_and_losses_of_one_method_are_drawn(make: Make, tmp_path: Path) -> None:
    runs = [make(f"alpha{alpha}", partition={"_target_": "x.Dirichlet", "alpha": alpha}) for alpha in (0.1, 1.0)]
    for run in runs:
        manifest = run.read("manifest.json")
        manifest["split"]["fingerprint"] = run.path.name
        run.write("manifest.json", manifest)
    names = comparison.compare(runs, tmp_path / "page.html", tmp_path / "paper", ("pdf", "svg")).parent / "paper"
    stems = {"accuracy", "knn_accuracy", "rankme", "loss", "spectrum"}
    splits = {"split-alpha=0.1", "split-alpha=1.0"}
    assert {path.name for path in names.iterdir()} == {f"{s}.{k}" for s in stems | splits for k in ("pdf", "svg")}


def test_spectra_over_the_rounds_stand_side_by_side(make: Make, tmp_path: Path) -> None:
    runs = [make("a"), make("b", method={"_target_": "fedssl.methods.byol.BYOL"})]
    for run in runs:
        parts = [
            {"round": at, "client": "merged", "part": "encoder", "rankme": 5.0, "spectrum": [1.0, 0.5, 0.1]}
            for at in (2, 4)
        ]
        (run.path / "collapse.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts))
    html = read(comparison.compare(runs, tmp_path / "page.html"))
    assert html.count("spectra over the rounds") == 4, "a picture and its caption for each"


def test_figures_for_a_paper_keep_their_text(make: Make, tmp_path: Path) -> None:
    import matplotlib

    run = make()
    before = dict(matplotlib.rcParams)
    assert cli.answer(["report", str(run.path), "--figures", str(tmp_path / "p"), "--format", "pdf,svg,png"]) == 0
    assert dict(matplotlib.rcParams) == before
    pdf, svg = ((tmp_path / "p" / f"loss.{kind}").read_bytes() for kind in ("pdf", "svg"))
    assert b"/FontFile2" in pdf, "TrueType, embedded"
    assert b"communication round</text>" in svg
    assert b"</text>" not in (run.path / "figures" / "loss.svg").read_bytes(), "a page needs no font"


def test_figures_can_be_told_apart_without_colour() -> None:
    """Up to a dozen curves: each has dashes and a marker, filled or not, of its own."""
    looks = [(figures.MARKERS[i % 7], figures.LINES[i % 5], i % 2) for i in range(12)]
    assert len(set(looks)) == 12


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--figures"], "--figures needs a value"),
        (["--figures", "f", "--format", "jpeg"], "'jpeg' is no kind of figure: use pdf, svg, png"),
        (["--format", "pdf"], "add --figures FOLDER"),
        (["--colour"], "--colour is not an option of report"),
    ],
)
def test_wrong_options_of_report(
    options: list[str], sentence: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.answer(["report", str(make().path), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_page_among_the_runs_is_passed_over(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(make(name).path) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    Path("page.html").write_text("")
    assert cli.answer(["report", *paths, "page.html"]) == 0
    assert "2 runs of 1 configuration" in Path("comparison.html").read_text()
    assert cli.answer(["report", "page.html"]) == 2
    assert "page.html is a file, not a run" in capsys.readouterr().err


def test_a_table_for_a_terminal_leaves_out_what_all_share(make: Make) -> None:
    told = comparison.as_text(comparison.table(three_seeds(make)[:3])).splitlines()
    assert told[0].split()[:2] == ["run", "seed"]
    assert told[-1].startswith("mean of 3 runs")
    assert "SimCLR" in comparison.as_text(comparison.table([make()]))


def test_unlike_spectra_are_no_mean(make: Make) -> None:
    runs = three_seeds(make)[:2]
    runs[1].write("probes.json", {"probes": {}, "spectra": {"federated": [1.0, 0.5]}})
    (one,) = configurations(runs)
    assert [len(run.spectra["federated"]) for run in one.runs] == [8, 2]
    assert Record.read(runs[1]).dim == 2


@figures.styled
def four_long_names() -> Figure:
    figure, axes = figures.new()
    for name in ("SimCLR · alpha=0.1", "SimCLR · alpha=100", "BYOL · alpha=0.1", "BYOL · alpha=100"):
        axes.plot([0, 1], [0, 1], label=f"{name} (2 runs)")
    figures.legend(figure, axes)
    figure.draw_without_rendering()
    return figure


def test_a_legend_of_four_long_names_stays_on_the_figure() -> None:
    figure = four_long_names()
    (drawn,) = figure.legends
    assert drawn.get_window_extent().x1 <= figure.bbox.x1
