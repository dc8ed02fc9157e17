"""The laws of a run: resume, label shuffle, client order, workers; each with methods and strategies that keep state."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, assert_same, execute, final_arrays

from fedssl import simulation
from fedssl.config import Plan
from fedssl.errors import ConfigError, FedsslError
from fedssl.flower import server, state_files
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory
from simulations import cli

Compose = Callable[..., Plan]

BUFFERED = (
    *("participation=buffered", "participation.concurrency=3", "participation.buffer=2"),
    *("pace@participation.pace=listed", "participation.pace.times_s=[1.0, 1.7, 2.9]"),
)
STATEFUL = [
    (),
    ("method=byol", "strategy.share.teacher=local"),
    ("method=byol", "strategy.share.predictor=local", "encoder.norm=batch", "participation.fraction=0.67"),
    ("strategy=fedbn", "participation.fraction=0.67"),
    ("method=moco", "method.queue=16"),
    ("strategy=fedadam", "method=simsiam"),
    ("strategy=fedmedian", "local.optimizer=sgd", "checkpoint_every=2"),
    ("strategy=fedema", "method=byol", "participation.fraction=0.67"),
    (
        "strategy=fedu",
        "method=simsiam",
        "strategy.threshold=0.0001",
        "participation.fraction=0.67",
        "checkpoint_every=2",
    ),
    ("strategy=fedbyol_online_target_local", "method=byol"),
    ("strategy=ldawa", "strategy.warmup=1"),
    ("compression=topk_int8", "compression.down=float16", "participation.fraction=0.67", "encoder.norm=batch"),
    ("compression=int8", "compression.error_feedback=false", "strategy=fedadam"),
    (
        *("participation=poisson", "participation.fraction=0.6", "participation.dropout=0.2", "strategy=fedema"),
        *("available@participation.available=day_night", "method=byol", "seed=3"),
    ),
    ("participation=stragglers", "local.epochs=2", "method=byol", "strategy.share.teacher=local"),
    (*BUFFERED, "strategy=fedu", "method=byol", "strategy.threshold=0.0001", "checkpoint_every=2"),
    ("aggregation=mean", "method=byol", "participation.fraction=0.67"),
    ("aggregation=bounded", "strategy=fedadam"),
]


class _Stop(Exception):  # noqa: N818  # not an error: the test's stand-in for a kill
    pass


def interrupted(plan: Plan, after: int, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Run a plan and kill it in the round after `after`, when clients have trained but nothing is written."""
    rundir = plan.open()
    genuine = server._round

    def dying(run: Any, strategy: Any, at: int, *rest: Any) -> Any:
        if at == after + 1:
            run = replace(run, rundir=_Unwritable(rundir.path))
        return genuine(run, strategy, at, *rest)

    with monkeypatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(server, "_round", dying)
        plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
    return rundir


class _Unwritable(RunDirectory):
    def log(self, *_: Any) -> None:
        raise _Stop


def metrics(rundir: RunDirectory) -> list[dict[str, Any]]:
    """The logged rows without times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rundir.rows()]


@pytest.mark.parametrize("overrides", STATEFUL, ids=lambda o: "-".join(o) or "default")
def test_four_rounds_are_two_and_a_kill_and_two(
    overrides: tuple[str, ...], plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("federation.rounds=4", "evaluate.every=1", *overrides)
    straight = execute(plan(*options, name="straight"))
    broken = interrupted(plan(*options, name="broken"), 2, monkeypatch)
    assert not broken.done
    resumed = execute(plan(*options, name="broken"))
    assert_same(final_arrays(straight), final_arrays(resumed))
    assert metrics(straight) == metrics(resumed)
    assert straight.rows("collapse.jsonl") == resumed.rows("collapse.jsonl") != []
    assert [row["round"] for row in resumed.rows("clients.jsonl")] == [
        row["round"] for row in straight.rows("clients.jsonl")
    ]
    for client in range(3):
        ours, theirs = (state_files.newest(run.clients, client, 99) for run in (resumed, straight))
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.name == theirs.name
            one, other = state_files.read(ours), state_files.read(theirs)
            assert_same(one.local, other.local)
            assert_same(one.mine, other.mine)
            assert_same(one.residual, other.residual)
            assert one.memo == other.memo
    summaries = [
        {k: v for k, v in run.read("summary.json").items() if "seconds" not in k} for run in (straight, resumed)
    ]
    assert summaries[0] == summaries[1]


def test_kill_minus_nine_at_any_moment(plan: Compose, tmp_path: Path) -> None:
    """A real process, killed at several moments, resumed until it ends."""
    options = [*TINY, "federation.rounds=12", "data.train=120", f"out={tmp_path}", "method=byol"]
    options += ["strategy.share.teacher=local"]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simulations.cli", "pretrain", *options, "name=killed"]
    root = Path(__file__).resolve().parent.parent
    folder = tmp_path / "killed"
    kills = 0
    for rounds_seen in (2, 7):  # its row is written, the checkpoint of the same round is not, or not whole
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        limit = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < limit:
            log = folder / "metrics.jsonl"
            if log.exists() and log.read_text().count("\n") >= rounds_seen:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors.decode()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2, "the run was too quick to be killed"
    assert cli.answer(["resume", str(folder)]) == 0
    straight = execute(plan(*options[len(TINY) :], name="straight"))
    killed = RunDirectory(folder)
    assert killed.done
    assert (folder / "report.html").exists()
    assert_same(final_arrays(straight), final_arrays(killed))
    assert metrics(straight) == metrics(killed)


def test_labels_never_reach_the_training(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from fedssl.datasets.synthetic import Synthetic
    from fedssl.job import setup

    options = ("partition=iid", "evaluate.every=1")
    ordinary = execute(plan(*options, name="ordinary"))
    genuine = Synthetic.load

    def shuffled(self: Synthetic) -> Any:
        data = genuine(self)
        targets = np.random.default_rng(9).permutation(data.train.targets)
        assert (targets != data.train.targets).any()
        return replace(data, train=replace(data.train, targets=targets))

    monkeypatch.setattr(Synthetic, "load", shuffled)
    setup._load.cache_clear()
    blind = execute(plan(*options, name="blind"))
    setup._load.cache_clear()
    assert_same(final_arrays(ordinary), final_arrays(blind))
    assert metrics(ordinary) != metrics(blind), "the probes do read labels"


@pytest.mark.parametrize(
    "overrides", [BUFFERED, ("method=byol", "strategy.share.teacher=local"), ("strategy=fedadam",)]
)
def test_the_number_of_workers_does_not_matter(overrides: tuple[str, ...], plan: Compose) -> None:
    runs = [execute(plan(*overrides, f"engine.workers={w}", name=f"w{w}")) for w in (1, 2, 3)]
    for run in runs[1:]:
        assert_same(final_arrays(runs[0]), final_arrays(run))
        assert metrics(runs[0]) == metrics(run)


def test_a_finished_run_is_left_alone(plan: Compose) -> None:
    first = simulation.run(plan(), Reporter(quiet=True))
    before = {p: p.stat().st_mtime_ns for p in plan().path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert simulation.run(plan(), Reporter(quiet=True)).summary == plan().open().read("summary.json")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert first.summary["rounds"] == 2


def test_another_configuration_is_refused_in_the_same_place(plan: Compose) -> None:
    execute(plan())
    with pytest.raises(ConfigError, match=r"local.lr: 0.002 there, 0.01 here"):
        plan("local.lr=0.01").open()


def test_a_diverging_run_keeps_its_rounds(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedssl import client

    genuine = client.schedules.learning_rate

    def explode(progress: float, *rest: Any) -> float:
        return genuine(progress, *rest) if progress < 0.5 else float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(client.schedules, "learning_rate", explode)
        broken = plan("federation.rounds=4")
        with pytest.raises(FedsslError, match="lower local.lr"):
            execute(broken)
    rundir = RunDirectory(broken.path)
    assert [row["round"] for row in rundir.rows()] == [1, 2]
    assert not rundir.done
    straight = execute(plan("federation.rounds=4", name="straight"))
    assert_same(final_arrays(straight), final_arrays(execute(broken)))


def test_a_damaged_checkpoint_is_one_sentence(plan: Compose) -> None:
    chosen = plan()
    rundir = execute(chosen)
    (rundir.path / "summary.json").unlink()
    (rundir.path / "checkpoints" / "000002" / "server.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FedsslError, match="damaged or missing"):
        execute(chosen)
    shutil.rmtree(rundir.path)
