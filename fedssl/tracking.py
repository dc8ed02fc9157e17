"""Trackers: what a run logs, shown by TensorBoard, MLflow or Weights & Biases as well.

They are told what has been written to the run's directory already; they change no bit of a run and are no part of what
makes it this run. A resumed run goes on in the same place.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from fedssl.errors import ConfigError
from fedssl.files import number
from fedssl.rundir import RunDirectory
from fedssl.tree import flatten

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Told:
    """What a tracker takes while a run goes on."""

    row: Callable[[int, Numbers], None]  # the numbers of a round
    summary: Callable[[Numbers], None]  # the numbers of the whole run, at its end


class Track(Protocol):
    """A tracker: a frozen dataclass with its options."""

    def follow(self, run: RunDirectory) -> AbstractContextManager[Told]:
        """Open the tracker's own record of this run, new or begun before, and close it at the end.

        Raises:
            ConfigError: its package is not installed, or it cannot be begun.
        """
        ...


@contextmanager
def followed(track: Track, run: RunDirectory) -> Iterator[None]:
    """Tell a tracker every round that is logged meanwhile, and the summary if the run comes to its end."""
    with track.follow(run) as told:

        def tell(row: Mapping[str, Any]) -> None:
            told.row(int(row["round"]), _numbers(row))

        run.followers.append(tell)
        try:
            yield
        finally:
            run.followers.remove(tell)
        if run.done:
            told.summary(_numbers(run.read("summary.json")))


@dataclass(frozen=True)
class Untracked:
    """No tracker."""

    @contextmanager
    def follow(self, run: RunDirectory) -> Iterator[Told]:
        """See `Track`."""
        yield Told(lambda at, numbers: None, lambda numbers: None)


@dataclass(frozen=True)
class TensorBoard:
    """Event files in the run's folder `tensorboard`: `tensorboard --logdir runs` shows all runs.

    What a resumed run repeats hides what an interrupted one has written of those rounds.
    """

    @contextmanager
    def follow(self, run: RunDirectory) -> Iterator[Told]:
        """See `Track`."""
        _needed("tensorboard", "tensorboard")
        events, done = importlib.import_module("torch.utils.tensorboard"), run.rounds
        with events.SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1) as writer:
            if not done:
                writer.add_text("config", f"```yaml\n{yaml.safe_dump(run.config(), sort_keys=False)}```")

            def row(at: int, numbers: Numbers) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, at)
                writer.flush()

            def summary(numbers: Numbers) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(f"summary/{key}", value, int(numbers["rounds"]))

            yield Told(row, summary)


@dataclass(frozen=True)
class MLflow:
    """A run of MLflow, found again by the identity of ours; rounds that it has already are not told twice.

    Attributes:
        uri: of the store; None for one in the run's own folder, `mlflow.db`.
        experiment: where the run is listed.
    """

    uri: str | None = None
    experiment: str = "fedssl"

    @contextmanager
    def follow(self, run: RunDirectory) -> Iterator[Told]:
        """See `Track`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = _needed("mlflow", "mlflow")
        try:
            client = mlflow.MlflowClient(self.uri or f"sqlite:///{run.path.resolve() / 'mlflow.db'}")
            entry = self._entry(client, run, mlflow.entities.Param)
            told = max((metric.step for metric in client.get_metric_history(entry, "seconds")), default=0)
        except mlflow.exceptions.MlflowException as error:
            first = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
            raise ConfigError(f"track=mlflow cannot begin ({first}): give another track.uri, or track=none") from error

        def put(at: int, numbers: Numbers) -> None:
            now = int(1000 * time.time())
            metrics = [mlflow.entities.Metric(key, value, now, at) for key, value in numbers.items()]
            client.log_batch(entry, metrics=metrics)

        def row(at: int, numbers: Numbers) -> None:
            if at > told:
                put(at, numbers)

        def summary(numbers: Numbers) -> None:
            put(int(numbers["rounds"]), {f"summary.{key}": value for key, value in numbers.items()})

        yield Told(row, summary)
        client.set_terminated(entry)

    def _entry(self, client: Any, run: RunDirectory, param: Callable[[str, str], Any]) -> str:
        """The identifier of the run, made with its configuration if it is new."""
        known = client.get_experiment_by_name(self.experiment)
        where = known.experiment_id if known else client.create_experiment(self.experiment)
        identity = run.identity()
        found = client.search_runs([where], f"tags.fedssl_run = '{identity}'")
        if found:
            return str(found[0].info.run_id)
        entry = str(client.create_run(where, run_name=run.path.name, tags={"fedssl_run": identity}).info.run_id)
        options = [param(key.replace("@", "."), str(value)[:500]) for key, value in flatten(run.config())]
        for at in range(0, len(options), 100):  # more are refused at once
            client.log_batch(entry, params=options[at : at + 100])
        return entry


@dataclass(frozen=True)
class WeightsAndBiases:
    """A run of Weights & Biases in the run's folder `wandb`; offline, `wandb sync` sends it later.

    Attributes:
        project: where the run is listed.
        mode: offline or online.
    """

    project: str = "fedssl"
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ConfigError(f"track.mode={self.mode} is unknown: use offline or online")

    @contextmanager
    def follow(self, run: RunDirectory) -> Iterator[Told]:
        """See `Track`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = _needed("wandb", "wandb")
        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        place: dict[str, Any] = {"project": self.project, "mode": self.mode, "dir": str(run.path), "settings": settings}
        same = {"id": run.identity(), "name": run.path.name, "resume": "allow"}
        try:
            session = wandb.init(config=run.config(), **place, **same)
        except wandb.errors.Error as error:
            first = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
            raise ConfigError(f"track=wandb cannot begin ({first}): use track.mode=offline, or track=none") from error
        failed = 1
        try:
            yield Told(lambda at, numbers: session.log(dict(numbers), step=at), session.summary.update)
            failed = 0
        finally:
            session.finish(exit_code=failed)  # as a context manager it would print a traceback


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn of a row or a summary."""
    found = ((key, number(value)) for key, value in content.items() if key != "round")
    return {key: value for key, value in found if value is not None}


def _needed(package: str, option: str) -> Any:
    """Import a tracker's package.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"track={option} needs {package}, which is not installed: pip install 'fedssl[track]', or track=none"
        )
    return importlib.import_module(package)
