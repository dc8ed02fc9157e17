"""Where the clients run. Every engine runs the same round loop and the same ClientApp."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl.cohort.choice import Choice
from fedssl.errors import ConfigError, ProtocolError
from fedssl.files import write_json
from fedssl.flower.client.worker import forget
from fedssl.flower.client_app import app as client_app
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.server import federate
from fedssl.flower.workers.heap import keep_freed
from fedssl.job import Job
from fedssl.job.setup import data_of, device_of, public_of
from fedssl.job.shards import parts_of
from fedssl.partition import sizes_of
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory
from fedssl.sites import Sites


class Engine(Protocol):
    """A way to run a job to its end."""

    def run(self, job: Job, rundir: RunDirectory, reporter: Reporter) -> dict[str, Any]:
        """Run or resume the job; returns its summary."""
        ...


@dataclass(frozen=True)
class InProcess:
    """All clients in this process, on worker threads: no start-up, nothing serialised. The default.

    `workers=0` takes one thread a core on the CPU, and one on a GPU. The result does not depend on the number.

    Attributes:
        workers: threads that train.
        cohort: how many clients of a round a worker trains at once, as one batch of models: the same result within
            rounding, in less time where models and batches are small. `auto` measures in the first rounds, writes
            what it found to `cohort.json` in the run's directory, and keeps to it.
        state_limit_mib: memory for what clients keep between rounds (teachers, queues, residuals, ledgers); what has
            not been used for longest is on disk above it. null: no limit. The result does not depend on it.
        sites: the data of each client (partition=sites), in their order: a rehearsal of what nodes with these in their
            `data-dir` compute.
    """

    workers: int = 0
    cohort: int | str = 1
    state_limit_mib: int | None = 2048
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(
                f"engine.workers={self.workers} is negative: give a number of threads, or 0 for one a core"
            )
        if self.state_limit_mib is not None and self.state_limit_mib < 0:
            raise ConfigError(
                f"engine.state_limit_mib={self.state_limit_mib} is negative: give MiB, or null for no limit"
            )
        if self.cohort != "auto" and not (isinstance(self.cohort, int) and self.cohort >= 1):
            raise ConfigError(f"engine.cohort={self.cohort} trains nobody: give 1 client or more, or auto")

    _processes: ClassVar[bool] = False

    def run(self, job: Job, rundir: RunDirectory, reporter: Reporter) -> dict[str, Any]:
        """See `Engine`."""
        keep_freed()
        torch.set_num_threads(job.threads)
        cores, on_cpu = max(1, len(os.sched_getaffinity(0)) // job.threads), device_of(job).type == "cpu"
        workers = min(self.workers or (cores if on_cpu else 1), job.federation.clients)
        if workers == 1 and on_cpu and not self._processes:
            # A merge beside the only thread that trains is in its way: each call of torch and numpy passes on Python's
            # lock. A GPU would wait for the merge, and another process has a lock of its own.
            workers = 0
        strict = job.federation.tolerate == 0
        choice, examples = _cohorts(self.cohort, job, rundir, reporter)
        about = (client_app, job.federation.clients, workers, strict, choice, examples)
        limit = None if self.state_limit_mib is None else self.state_limit_mib << 20
        where = (limit, rundir.clients.with_name("states"), self._sites(job), self._processes)
        try:
            with _quiet_flower(), InProcessGrid(*about, *where) as grid:
                summary = federate(grid, job, rundir, reporter)
                grid.states.clear()
                return summary
        finally:
            forget()

    def _sites(self, job: Job) -> tuple[str, ...]:
        if len(self.sites) != (job.federation.clients if isinstance(job.partition, Sites) else 0):
            raise ConfigError(
                f"engine.sites names {len(self.sites)} places of data for {job.federation.clients} clients with "
                f"partition={type(job.partition).__name__.lower()}: with partition=sites name one for each, else none"
            )
        return self.sites


@dataclass(frozen=True)
class Processes(InProcess):
    """As `InProcess`, with worker processes of one torch thread each: for steps so short that threads are in each
    other's way. Forked when the run begins, they have its imports and data at once; on Linux, without a GPU.

    `workers=0` takes one process a core. The result is that of `InProcess`, bit for bit.
    """

    _processes: ClassVar[bool] = True

    def run(self, job: Job, rundir: RunDirectory, reporter: Reporter) -> dict[str, Any]:
        """See `Engine`."""
        device = device_of(job)
        for odd, found, instead in (
            (sys.platform != "linux", f"this is {sys.platform}", "use engine=in_process or engine=ray"),
            (device.type != "cpu", f"the run trains on {device}", "use engine=in_process, or device=cpu"),
            (job.threads != 1, f"the run has threads={job.threads}", "set threads=1, or use engine=in_process"),
        ):
            if odd:
                raise ConfigError(f"engine=processes forks workers of one thread, on Linux, but {found}: {instead}")
        if not isinstance(job.partition, Sites):
            data_of(job, device)  # once, before the fork, and not in each worker
            public_of(job, device)
        return super().run(job, rundir, reporter)


def _cohorts(
    cohort: int | str, job: Job, rundir: RunDirectory, reporter: Reporter
) -> tuple[Choice, Callable[[int], int] | None]:
    """The sizes of cohorts, and the examples of nodes by which clients are put together."""
    if cohort == 1:
        return Choice(1, job.federation.clients), None
    path = rundir.path / "cohort.json"
    if cohort == "auto" and path.exists():
        cohort = int(json.loads(path.read_text())["cohort"])

    def decided(size: int, seconds: Mapping[int, float]) -> None:
        write_json(path, {"cohort": size, "seconds_of_a_step": {str(key): value for key, value in seconds.items()}})
        gain = seconds[1] / seconds[size]
        reporter.say(
            f"training {size} clients at once, {gain:.1f} times as fast as one by one"
            if size > 1
            else "training clients one by one, which is the fastest here"
        )

    sizes = sizes_of(parts_of(job, device_of(job)))

    def examples(node: int) -> int:
        return int(sizes[node - 1])

    size = cohort if isinstance(cohort, int) else None
    return Choice(size, job.federation.clients, decided), examples


@dataclass(frozen=True)
class Ray:
    """Flower's own simulation: clients in Ray processes, on one or many machines. Needs the extra `fedssl[ray]`."""

    cpus: int = 0  # of the whole simulation; 0 = all of this machine
    cpus_per_client: float = 1.0
    gpus_per_client: float = 0.0

    def run(self, job: Job, rundir: RunDirectory, reporter: Reporter) -> dict[str, Any]:
        """See `Engine`."""
        found = importlib.util.find_spec("ray")
        if found is None:
            raise ConfigError(
                "engine=ray needs Ray, which is not installed: pip install 'fedssl[ray]', or engine=in_process"
            )
        if found.submodule_search_locations is None:  # importing it would run that script again, inside of itself
            raise ConfigError(f"engine=ray needs Ray, and the file {found.origin} goes by its name: rename that file")
        cluster = os.environ.get("RAY_ADDRESS")
        if cluster and self.cpus:
            raise ConfigError(
                f"engine.cpus={self.cpus} starts a Ray with so many processors, and RAY_ADDRESS={cluster} names a "
                "cluster, which has its own: set engine.cpus=0, or unset RAY_ADDRESS"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
        from flwr.simulation import run_simulation

        summaries: list[dict[str, Any]] = []
        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            summaries.append(federate(grid, job, rundir, reporter, state_dir=rundir.clients.resolve()))

        init: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        if self.cpus:
            init["num_cpus"] = self.cpus
        resources = {"num_cpus": self.cpus_per_client, "num_gpus": self.gpus_per_client}
        try:
            with _quiet_flower():
                run_simulation(
                    server_app,
                    client_app,
                    num_supernodes=job.federation.clients,
                    backend_config={"init_args": init, "client_resources": resources},  # type: ignore[dict-item]
                )
        except RuntimeError as error:
            raise ProtocolError(
                f"Flower's simulation runtime stopped ({_root_cause(error)}): free memory or processors, or use "
                "engine=in_process; `fedssl resume` continues from the last checkpoint"
            ) from error
        return summaries[0]


def _root_cause(error: BaseException) -> str:
    """The first line of the exception that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs every round; the run has its own progress line."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
