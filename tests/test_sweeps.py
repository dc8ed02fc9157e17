"""Sweeps as a person meets them: progress over all cells, what is done skipped, a wrong cell, ctrl-C, launchers."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_cli import COMMAND, ENVIRONMENT, Done

from simulations import cli
from simulations.sweeps import command

QUICK = [*TINY, "federation.rounds=1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's own record of a sweep goes where it cannot be seen."""
    monkeypatch.chdir(tmp_path)


def sweep(*arguments: str, rounds: int = 1) -> Done:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.answer(["pretrain", "-m", *TINY, f"federation.rounds={rounds}", *arguments])
    return Done(code, out.getvalue(), err.getvalue())


def test_a_sweep_tells_its_cells_skips_what_is_done_and_compares(tmp_path: Path) -> None:
    first = sweep("seed=0,1")
    assert first.returncode == 0, first.stderr
    assert "cell 1 of 2: seed=0" in first.stderr
    assert "cell 2 of 2: done in" in first.stderr
    assert "(1 done; about" in first.stderr
    assert "(2 done)" in first.stderr
    assert "mean of 2 runs" in first.stdout
    page = tmp_path / "runs" / "comparison-seed.html"
    assert "2 runs of 1 configuration" in page.read_text()
    again = sweep("seed=0,1", "strategy=fedavg,fedprox")
    assert again.returncode == 0, again.stderr
    assert "cell 1 of 4: seed=0 strategy=fedavg: done before (1 done before)" in again.stderr
    assert "4 cells: 2 done, 2 done before; comparison: runs/comparison-seed-strategy.html" in again.stdout
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 4


def test_a_wrong_cell_says_why_and_does_not_stop_the_others(tmp_path: Path) -> None:
    done = sweep("local.lr=0.1,-1,0.2")
    assert done.returncode == 2
    assert "cell 2 of 3: local.lr=-1: failed: " in done.stderr
    assert "(1 done, 1 failed; about" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cell 2 of 3 (local.lr=-1): ")
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["seed=0,1", "name=x"], "name=x would give all 2 cells one directory"),
        (["method=simclr,simclrr"], "did you mean method=simclr"),
        (["--cfg", "job"], "Only one of --run, --multirun"),
        (["hydra.launcher.n_jobs=2"], "come with it, as with hydra/launcher=joblib"),
        (["hydra/launcher=submitit_local", "seed=0,1"], "pip install 'hydra-submitit_local-launcher'"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = sweep(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "runs").exists()


def test_cells_are_counted_as_hydra_multiplies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(command, "application", lambda task, arguments: counted.append(task.count))
    for words, cells in (
        (["seed=0,1,2", "method=simclr,byol"], 6),
        (["seed=range(0,5)"], 5),
        (["method=glob(sim*)"], 2),
        (["seed=0,1", "seed=3"], 1),
        (["hydra/sweeper=other", "local.lr=interval(0,1)"], 0),
        ([], 1),
    ):
        assert command.main(["-m", *words]) == 0
        assert counted.pop() == cells, words


def test_a_name_may_hold_what_differs(tmp_path: Path) -> None:
    done = sweep("seed=0,1", "name=mine-${seed}")
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("runs/*/summary.json")} == {"mine-0", "mine-1"}


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the second cell; the same command reads the first and resumes the second."""
    options = [*COMMAND, "pretrain", "-m", *TINY, "name=cell-${federation.rounds}", f"out={tmp_path}/runs"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*options, "federation.rounds=1,60"], cwd=tmp_path, env=environment, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    point, limit = tmp_path / "runs" / "cell-60" / "checkpoints" / "LATEST", time.monotonic() + 200
    try:
        while not point.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert point.exists(), process.poll()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert "cell 1 of 2: done in" in errors
    assert "the same command" in errors
    assert "Traceback" not in errors
    reached = int(point.read_text())
    assert reached < 60
    done = sweep("name=cell-${federation.rounds}", "federation.rounds=1,60")
    assert done.returncode == 0, done.stderr
    assert "cell 1 of 2: federation.rounds=1: done before" in done.stderr
    assert f"cell-60: {60 - reached} of 60 rounds to go" in done.stderr


@pytest.mark.slow  # docs/sweeps.md runs such a sweep, too
def test_joblib_runs_cells_at_once_and_progress_is_told(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "local.lr=0.1,-1,0.2", "engine.workers=1"]
    done = subprocess.run(
        [*COMMAND, "pretrain", "-m", *QUICK, *options], cwd=tmp_path, text=True, capture_output=True, timeout=200,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "3 cells: 2 done, 1 failed; comparison: " in done.stdout
    for cell in (1, 3):
        assert f"cell {cell} of 3: done in" in done.stderr
    assert "2 done, 1 failed)" in done.stderr, "the last to end knows of those in other processes"
    assert done.stderr.count("Traceback") == 0
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2
