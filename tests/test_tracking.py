"""Trackers are told what the run's directory holds; they change nothing, and a resumed run goes on in its place."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same, execute, final_arrays, tiny

from fedssl import config, simulation
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.progress import Reporter
from fedssl.report.record import Record
from fedssl.rundir import RunDirectory
from simulations.studies.base import Bench

Compose = Callable[..., Plan]


class StopError(Exception):
    """Ends a run after some rounds."""


class Stopping(Reporter):
    """Stops after a round, as a kill between the log and the checkpoint of the next one would."""

    def __init__(self, after: int) -> None:
        Reporter.__init__(self, quiet=True)
        self.after = after

    def round(self, number: int, row: Any) -> None:
        if number == self.after:
            raise StopError


def tracked(plan: Plan) -> Record:
    return simulation.run(plan, Reporter(quiet=True))


def interrupted(plan: Plan, after: int) -> None:
    with pytest.raises(StopError):
        simulation.run(plan, Stopping(after))


def events(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.path / "tensorboard"), purge_orphaned_data=True)
    shown.Reload()
    return {tag: [(each.step, each.value) for each in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_holds_every_round_once_also_of_a_resumed_run(plan: Compose) -> None:
    pytest.importorskip("tensorboard")
    chosen = plan("track=tensorboard", "federation.rounds=4", "checkpoint_every=2")
    interrupted(chosen, after=3)  # the third is repeated: its checkpoint was not due
    record = tracked(chosen)
    shown = events(RunDirectory(record.path))
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in shown["loss"]] == pytest.approx([row["loss"] for row in record.rows])
    assert shown["summary/bytes_up"] == [(4, record.summary["bytes_up"])]


def test_runs_of_a_study_are_followed_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = Bench(tmp_path, ["track=tensorboard"]).pretrain(*tiny("method=simclr"))
    assert [step for step, _ in events(run)["loss"]] == [1, 2]


def test_a_tracker_changes_no_bit_and_is_no_part_of_a_run(plan: Compose) -> None:
    pytest.importorskip("tensorboard")
    with_one, without = plan("track=tensorboard", name="with"), plan(name="without")
    assert with_one.job.fingerprint == without.job.fingerprint
    tracked(with_one)
    assert_same(final_arrays(with_one.open()), final_arrays(execute(without)))
    assert plan(name="with").open().done, "the same run, whoever is told of it"


def test_a_run_of_before_trackers_goes_on(plan: Compose) -> None:
    run = execute(plan())
    tree = run.config()
    del tree["track"]
    assert config.Plan.of(tree).track == config.UNTRACKED


@pytest.mark.parametrize("option", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_one_sentence(option: str, plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == option else genuine(name, *rest)
    )
    with pytest.raises(ConfigError, match=f"track={option} needs {option}.*fedssl.track"):
        tracked(plan(f"track={option}"))


def test_wandb_is_told_in_its_own_words(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: the package is large, and its offline mode starts a service of its own."""
    began: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    summary: dict[str, float] = {}
    ended: list[int] = []

    class Session:
        def __init__(self) -> None:
            self.summary = summary

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self, exit_code: int) -> None:
            ended.append(exit_code)

    def init(**about: Any) -> Session:
        began.append(about)
        return Session()

    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    vars(stand_in).update(init=init, Settings=lambda **_: None, errors=types.SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    chosen = plan("track=wandb", "federation.rounds=3", "checkpoint_every=2")
    interrupted(chosen, after=1)
    record = tracked(chosen)
    assert [about["id"] for about in began] == [RunDirectory(record.path).identity()] * 2
    assert {about["mode"] for about in began} == {"offline"}
    assert began[0]["resume"] == "allow"
    assert began[0]["config"]["method"]["_target_"] == "fedssl.methods.simclr.SimCLR"
    assert [step for step, _ in logged] == [1, 1, 2, 3]
    assert logged[-1][1]["loss"] == record.rows[-1]["loss"]
    assert summary["bytes_up"] == record.summary["bytes_up"]
    assert ended == [1, 0]


@pytest.mark.filterwarnings("ignore")  # MLflow's own, of the libraries that it uses
def test_mlflow_holds_every_round_once(plan: Compose, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    chosen = plan("track=mlflow", "federation.rounds=3", "checkpoint_every=2")
    interrupted(chosen, after=1)
    record = tracked(chosen)
    client = mlflow.MlflowClient(f"sqlite:///{record.path / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "fedssl"]
    (entry,) = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(entry.info.run_id, "loss")
    assert [each.step for each in losses] == [1, 2, 3]
    assert [each.value for each in losses] == pytest.approx([row["loss"] for row in record.rows])
    assert entry.data.params["method._target_"] == "fedssl.methods.simclr.SimCLR"
    assert entry.info.status == "FINISHED"


def test_an_unknown_mode_of_wandb_is_refused() -> None:
    with pytest.raises(ConfigError, match="offline or online"):
        config.compose(["track=wandb", "track.mode=never"])
