"""The command line as a person meets it: exit codes, single sentences, what is printed and left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TINY

from simulations import cli, threads

ROOT = Path(__file__).resolve().parent.parent
QUICK = [*TINY, "federation.rounds=1"]
COMMAND = [sys.executable, "-m", "simulations.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Done:
    """What a command leaves."""

    returncode: int
    stdout: str
    stderr: str


def fedssl(*arguments: str) -> Done:
    """Run the command in this process, as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.answer(arguments)
    return Done(code, out.getvalue(), err.getvalue())


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("runs")
    done = fedssl(
        "pretrain", *TINY, "evaluate.every=1", "evaluate.final=true", "evaluate.repeats=2", f"out={out}", "name=tiny"
    )
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout
    assert "random encoder" in done.stdout
    return out / "tiny"


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    for name in (
        "config.yaml", "manifest.json", "metrics.jsonl", "clients.jsonl", "summary.json", "split.json",
        "encoder.safetensors", "encoder.json", "report.html", "checkpoints/LATEST",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "figures").glob("*.png"))
    assert list((finished / "figures").glob("*.svg"))
    assert not [p for p in finished.rglob("*") if p.suffix in (".tmp", ".pkl", ".pt")]
    summary = json.loads((finished / "summary.json").read_text())
    for key in (
        "rounds", "loss", "knn_accuracy", "linear_accuracy", "random_encoder_linear_accuracy", "rankme", "feature_std",
        "epsilon", "seconds", "bytes_up", "bytes_down",
    ):  # fmt: skip
        assert key in summary, key
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    for key in (
        "loss", "knn_accuracy", "rankme", "feature_std", "uniformity", "alignment", "bytes_up", "bytes_down", "seconds",
        "client_knn_accuracy", "client_rankme", "client_cka", "merge_gap_knn", "merge_gap_rankme",
    ):  # fmt: skip
        assert key in rows[-1], key
    assert "epsilon" not in rows[-1], "a key is absent where it was not measured"
    manifest = json.loads((finished / "manifest.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", manifest["split"]["fingerprint"])
    assert {"label_emd", "gini"} <= manifest["split"].keys()
    assert manifest["torch_threads"] == 1
    assert manifest["versions"]["torch"]


def test_the_encoder_loads_without_the_run(finished: Path, tmp_path: Path) -> None:
    import torch

    import fedssl as package

    for name in ("encoder.safetensors", "encoder.json"):
        shutil.copy(finished / name, tmp_path)
    encoder = package.load_encoder(tmp_path)
    features = encoder(torch.rand(5, 3, 8, 8))
    assert features.shape == (5, encoder.dim)
    assert not encoder.training


def test_probe_repeats_the_summary(finished: Path) -> None:
    done = fedssl("probe", str(finished))
    assert done.returncode == 0, done.stderr
    printed = dict(line.split() for line in done.stdout.splitlines())
    summary = json.loads((finished / "summary.json").read_text())
    assert float(printed["linear_accuracy"]) == pytest.approx(summary["linear_accuracy"], abs=1e-4)
    assert float(printed["one_label_accuracy"]) == pytest.approx(summary["one_label_accuracy"], abs=1e-4)


def test_report_of_one_and_of_several(finished: Path, tmp_path: Path) -> None:
    (finished / "report.html").unlink()
    one = fedssl("report", str(finished))
    assert one.returncode == 0, one.stderr
    assert (finished / "report.html").exists()
    page = tmp_path / "both.html"
    both = fedssl("report", str(finished), str(finished), "--out", str(page))
    assert both.returncode == 0, both.stderr
    assert "tiny" in page.read_text()


def test_resume_of_a_finished_run_says_so(finished: Path) -> None:
    done = fedssl("resume", str(finished))
    assert done.returncode == 0, done.stderr
    assert "already finished" in done.stderr


def test_a_moved_run_resumes_where_it_is(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    (moved / "summary.json").unlink()
    done = fedssl("resume", str(moved))
    assert done.returncode == 0, done.stderr
    assert json.loads((moved / "summary.json").read_text())["rounds"] == 2


def test_a_wrong_use_ends_the_process_so_too() -> None:
    done = alone("resume", "/nowhere")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
    assert done.stderr.startswith("error: ")


def test_ctrl_c_keeps_the_rounds_and_says_how_to_go_on(tmp_path: Path) -> None:
    options = [*TINY, "federation.rounds=2000", f"out={tmp_path}", "name=x"]
    process = subprocess.Popen(
        [*COMMAND, "pretrain", *options], cwd=ROOT, env=ENVIRONMENT, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        # A shell in the background ignores SIGINT, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    log, limit = tmp_path / "x" / "checkpoints" / "LATEST", time.monotonic() + 200
    try:
        while not log.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert log.exists(), process.poll()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)  # a busy machine is slow; a run that goes on would take longer
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert "fedssl resume" in errors
    assert "Traceback" not in errors
    assert log.exists()


def test_hydra_is_all_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = fedssl("pretrain", "--cfg", "job", "method=byol")
    assert shown.returncode == 0, shown.stderr
    assert "_target_: fedssl.methods.byol.BYOL" in shown.stdout
    with pytest.raises(SystemExit, match="0"):
        cli.answer(["pretrain", "--help"])
    assert "method" in capsys.readouterr().out


def test_a_sweep_runs_every_cell(tmp_path: Path) -> None:
    done = fedssl("pretrain", "-m", *QUICK, f"out={tmp_path}", "seed=0,1", f"hydra.sweep.dir={tmp_path}/multirun")
    assert done.returncode == 0, done.stderr
    runs = [path for path in tmp_path.iterdir() if (path / "summary.json").exists()]
    assert len(runs) == 2


def test_list_and_doctor(finished: Path) -> None:
    listed = fedssl("list")
    assert listed.returncode == 0
    for word in ("method=byol", "strategy=fedadam", "partition=dirichlet", "engine=ray", "data=cifar10"):
        assert word in listed.stdout
    assert "method=byol" in fedssl("list", "methods").stdout
    assert "partition=iid" not in fedssl("list", "strategies").stdout
    doctor = fedssl("doctor")
    assert doctor.returncode == 0, doctor.stderr
    several = ["is fastest now"] if len(os.sched_getaffinity(0)) > 1 else []
    for word in ("torch", "cores", "gpu", "extra ray", *several):
        assert word in doctor.stdout


def test_doctor_names_the_fastest_use_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    here = threads.trials(2)
    assert all(threads.steps_a_second(trial, seconds=0.05) > 0 for trial in here)
    assert torch.get_num_threads() == before
    assert [trial[1:] for trial in here if trial.engine == "in_process"] == [(1, 1), (2, 1), (1, 2)]
    assert [trial[1:] for trial in here if trial.engine == "processes"] == [(2, 1)] * (sys.platform == "linux")
    speeds = {(1, 1): 10.0, (8, 1): 40.0, (4, 2): 50.0, (1, 8): 5.0}
    monkeypatch.setattr(
        threads, "steps_a_second", lambda trial: speeds[trial[1:]] * (1 + (trial.engine == "processes"))
    )
    if sys.platform == "linux":
        assert threads.advice(8, busy=0.5).startswith("engine=processes engine.workers=8 threads=1 is fastest")
    monkeypatch.setattr(threads, "steps_a_second", lambda trial: speeds[trial[1:]])
    assert threads.advice(8, busy=0.5).startswith("engine=in_process engine.workers=4 threads=2 is fastest")
    assert "busy" not in threads.advice(8, busy=0.5)
    assert "busy (load 7.0): measure again" in threads.advice(8, busy=7.0)


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    run = "from simulations.cli import dispatch; dispatch(['--help']); import sys; "
    code = run + "print([m for m in ('torch', 'flwr', 'hydra', 'matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    options = [*TINY, "federation.rounds=20", "evaluate.every=5", f"out={tmp_path}", "name=live"]
    process = subprocess.Popen(
        [*COMMAND, "pretrain", *options], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown.decode()
    text = shown.decode()
    assert "20/20" in text
    for word in ("loss", "kNN", "rank", "left"):
        assert word in text
    assert text.count("\n") < 20, "one line is drawn over, not twenty"
