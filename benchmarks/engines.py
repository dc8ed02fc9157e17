"""What the engines add to a bare training loop: `python -m benchmarks.engines`.

One workload for all systems: SimCLR of the four-convolution GroupNorm encoder on drawn 32x32x3 images, 96 examples a
client, batch 32, one local epoch, SGD with momentum, FedAvg. Every system trains the same clients with equal seeds and
must end with the same bits, which is checked. Nothing is evaluated inside the rounds and only the last round writes
a checkpoint, so that engines are compared and nothing else.

Each measurement is a fresh process with one torch thread a client; the systems take turns (A B C D A B C D ...), and a
ratio compares neighbours of the same turn. The first round is shown apart: in it each worker reads the data and builds
its model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.machine import age_s, cpu_s, machine, watched_memory
from benchmarks.tables import tables
from fedssl import config, tree
from fedssl.client import fit
from fedssl.config import Plan
from fedssl.datasets.base import Shard
from fedssl.files import write_json, write_text
from fedssl.flower import codec
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rounds import exchange
from fedssl.gradient import PlainGradient
from fedssl.job import Job, split
from fedssl.model import load_arrays, to_arrays
from fedssl.parts import Arrays
from fedssl.progress import Reporter
from fedssl.setup import build_model
from strategies.fedavg import FedAvg

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {  # name: overrides of the engine; the first is what the others are compared with
    "bare loop": (),
    "in_process, 1 worker": ("engine=in_process", "engine.workers=1"),
    "in_process, 2 workers": ("engine=in_process", "engine.workers=2"),
    "ray, 2 cpus": ("engine=ray", "engine.cpus=2", "engine.cpus_per_client=1"),
}
BARE = next(iter(SYSTEMS))
EMPTY = {  # name: worker threads, 0 = no engine, None = Ray
    "merge alone": 0,
    "in_process, 1 worker": 1,
    "in_process, 2 workers": 2,
    "ray, 2 cpus": None,
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LIMIT_S = 900.0  # of one measurement


@dataclass(frozen=True)
class Work:
    """The size of the workload."""

    clients: int = 100
    rounds: int = 4
    examples: int = 96  # a client
    batch_size: int = 32
    size: int = 32  # of an image, pixels a side
    width: int = 16

    def plan(self, system: str, folder: Path) -> Plan:
        """The run of this workload on one system; the job is the same for all."""
        return config.compose(
            [
                *("method=simclr", "encoder=conv4", f"encoder.width={self.width}", "data=synthetic", "partition=iid"),
                *(f"data.train={self.clients * self.examples}", "data.test=16", f"data.size={self.size}"),
                *("local.optimizer=sgd", "local.lr=0.05", f"local.batch_size={self.batch_size}", "local.epochs=1"),
                *(f"federation.clients={self.clients}", f"federation.rounds={self.rounds}"),
                *("evaluate.every=0", "evaluate.final=false", "checkpoint_every=1000000"),
                *("device=cpu", "threads=1", f"out={folder}", "name=run", *SYSTEMS[system]),
            ]
        )


def bare(job: Job, reporter: Reporter) -> Arrays:
    """The same training with no federation around it: one model, one thread, one running mean."""
    torch.set_num_threads(job.threads)
    data = job.data.load().train
    shards = [Shard.of(data, rows) for rows in split(job, data)]
    model = build_model(job, data.shape)
    now, rounds = to_arrays(model), job.federation.rounds
    reporter.begin(BARE, 0, rounds)
    for at in range(1, rounds + 1):
        mean = tree.ExactMean()
        for client, shard in enumerate(shards):
            load_arrays(model, now)
            options = {"round": at, "rounds": rounds, "seed": job.seed, "client": client}
            fit(job.method, model, shard, job.data.augment, job.local, gradient=PlainGradient(), **options)  # type: ignore[arg-type]
            mean.add(to_arrays(model), len(shard))
        now = mean.result(now)
        reporter.round(at, {})
    return now


def measure(system: str, work: Work) -> dict[str, Any]:
    """Run one system here and now: one row of results."""
    with tempfile.TemporaryDirectory() as folder, watched_memory() as samples:
        plan, clock = work.plan(system, Path(folder)), Clock()
        ready_s, start = age_s(), time.perf_counter()
        if system == BARE:
            arrays = bare(plan.job, clock)
        else:
            rundir = plan.open()
            plan.build_engine().run(plan.job, rundir, clock)
            point = rundir.latest()
            if point is None:
                raise RuntimeError(f"{system} left no checkpoint")
            arrays = point.arrays
    wall, cpu = zip(*clock.stamps, strict=True)
    return {
        "system": system,
        "imports_s": ready_s,
        "startup_s": wall[0] - start,
        "round_s": [b - a for a, b in pairwise(wall)],
        "round_cpu_s": [b - a for a, b in pairwise(cpu)],
        "peak_mib": max(mib for at, mib in samples if at <= wall[-1]),
        "parameters": sum(value.size for value in arrays.values()),
        "sha256": digest(arrays),
    }


def digest(arrays: Arrays) -> str:
    """The SHA-256 of all names, types, shapes and values."""
    total = hashlib.sha256()
    for key in sorted(arrays):
        value = arrays[key]
        total.update(f"{key} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return total.hexdigest()


class Clock(Reporter):
    """Notes wall and CPU seconds when the first client may start and when each round has ended; shows nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stamps: list[tuple[float, float]] = []

    def begin(self, title: str, done: int, rounds: int) -> None:
        """The first client starts now."""
        self.stamps.append((time.perf_counter(), cpu_s()))

    def round(self, number: int, row: Mapping[str, Any]) -> None:
        """A round has ended."""
        self.stamps.append((time.perf_counter(), cpu_s()))


# --- Clients that do nothing ------------------------------------------------------------------------------------------

idle = ClientApp()


@idle.train()
def _echo(message: Message, context: Context) -> Message:
    arrays = codec.decode(message.content.array_records[codec.ARRAYS])
    metrics: dict[str, int | float] = {codec.WEIGHT: 96, "partition-id": 0}
    return Message(codec.reply(arrays, metrics), reply_to=message)


def measure_empty(system: str, work: Work) -> dict[str, Any]:
    """Seconds of each round of clients that send back what they got; a first round is left out."""
    workers = EMPTY[system]
    with tempfile.TemporaryDirectory() as folder:
        job = work.plan(BARE, Path(folder)).job
    torch.set_num_threads(1)
    arrays, seconds = to_arrays(build_model(job, (3, 8, 8))), [0.0]
    if workers == 0:
        for _ in range(work.rounds + 1):
            start, mean = time.perf_counter(), tree.ExactMean()
            for _client in range(work.clients):
                mean.add(arrays, work.examples)
            mean.result(arrays)
            seconds.append(time.perf_counter() - start)
    elif workers is None:
        _on_ray(lambda grid: seconds.extend(_empty_rounds(grid, arrays, work)), work.clients)
    else:
        with InProcessGrid(idle, work.clients, workers) as grid:
            seconds.extend(_empty_rounds(grid, arrays, work))
    return {"system": system, "us_per_client": [1e6 * s / work.clients for s in seconds[2:]]}


def _empty_rounds(grid: Grid, arrays: Arrays, work: Work) -> Iterator[float]:
    strategy = FedAvg()
    while len(list(grid.get_node_ids())) < work.clients:
        time.sleep(0.05)
    for at in range(work.rounds + 1):
        start = time.perf_counter()
        messages = strategy.configure_train(at, codec.encode(arrays), ConfigRecord({}), grid)
        strategy.aggregate_train(at, exchange(grid, messages, LIMIT_S))
        yield time.perf_counter() - start


def _on_ray(use: Callable[[Grid], None], clients: int) -> None:
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        use(grid)

    init = {"include_dashboard": False, "log_to_driver": False, "num_cpus": 2}
    backend: Any = {"init_args": init, "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}}
    run_simulation(server, idle, num_supernodes=clients, backend_config=backend)


# --- Measuring in turn, and the tables --------------------------------------------------------------------------------


def fresh(name: str, work: Work) -> dict[str, Any]:
    """One measurement in a process of its own. `name` is a system, or `empty: ` and a system."""
    command = [sys.executable, "-m", "benchmarks.engines", "--system", name]
    command += ["--clients", str(work.clients), "--rounds", str(work.rounds)]
    with tempfile.TemporaryDirectory() as home:
        own = {
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        env = os.environ | dict.fromkeys(THREADS, "1") | own
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        try:
            out, err = child.communicate(timeout=LIMIT_S)
        finally:
            with suppress(ProcessLookupError):  # whatever a failed measurement has left running
                os.killpg(child.pid, signal.SIGTERM)
    if child.returncode:
        raise SystemExit(f"{name} failed:\n{err[-2000:]}")
    row: dict[str, Any] = json.loads(out.splitlines()[-1])
    return row


def here(name: str, work: Work) -> dict[str, Any]:
    """One measurement in this process; see `fresh`."""
    kind, _, system = name.rpartition("empty: ")
    return measure_empty(system, work) if kind or name != system else measure(system, work)


Once = Callable[[str, Work], dict[str, Any]]


def collect(work: Work, pairs: int, ray: bool, once: Once = fresh) -> dict[str, Any]:
    """All measurements: every system in turn, `pairs` times, then the empty clients likewise.

    Raises:
        RuntimeError: two runs ended with different bits.
    """
    names = [name for name in SYSTEMS if ray or "ray" not in name]
    empty = [name for name in EMPTY if ray or "ray" not in name]
    about = machine()
    runs = [{"pair": pair, **once(name, work)} for pair in range(pairs) for name in names]
    idles = [{"pair": pair, **once(f"empty: {name}", work)} for pair in range(pairs) for name in empty]
    hashes = {run["sha256"] for run in runs}
    if len(hashes) != 1:
        each = ", ".join(f"{run['system']}: {run['sha256'][:12]}" for run in runs)
        raise RuntimeError(f"the systems do not compute the same thing ({each})")
    rows = [_row(name, runs) for name in names]
    middle = [{"system": n, "us_per_client": _spread(_of(idles, n, "us_per_client"))} for n in empty]
    return {
        "machine": about,
        "work": work.__dict__,
        "pairs": pairs,
        "parameters": runs[0]["parameters"],
        "sha256": hashes.pop(),
        "rows": rows,
        "empty": middle,
        "runs": runs,
        "empty_runs": idles,
    }


def _of(runs: Iterable[Mapping[str, Any]], system: str, key: str) -> list[float]:
    """One number a pair: a value, or the mean over the rounds but the first (clients' rounds are all alike)."""
    values = [run[key] for run in runs if run["system"] == system]
    cut = 1 if key.startswith("round") else 0
    return [statistics.fmean(v[cut:] or v) if isinstance(v, list) else v for v in values]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of a system, and its ratios to the bare loop pair by pair."""
    row: dict[str, Any] = {"system": name}
    row["first_round_s"] = statistics.median(run["round_s"][0] for run in runs if run["system"] == name)
    for key in ("startup_s", "round_s", "round_cpu_s", "peak_mib"):
        row[key] = statistics.median(_of(runs, name, key))
    for key, ratio in (("round_s", "wall_ratio"), ("round_cpu_s", "cpu_ratio")):
        pairs = zip(_of(runs, name, key), _of(runs, BARE, key), strict=True)
        row[ratio] = _spread([mine / floor for mine, floor in pairs if floor > 0] or [float("nan")])
    return row


def main(argv: Sequence[str] | None = None, once: Once = fresh) -> int:
    """Measure and write `engines.json` and `engines.md`; `--quick` writes nothing unless `--out` is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--quick", action="store_true", help="8 clients, 2 rounds, 1 pair, and Ray only with --ray")
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, help="measure Ray, if it is installed")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    usual = (8, 2, 1) if options.quick else (100, 4, 5)
    work = Work(options.clients or usual[0], options.rounds or usual[1])
    if options.system:
        print(json.dumps(here(options.system, work)))
        return 0
    wanted = not options.quick if options.ray is None else options.ray
    result = collect(work, options.pairs or usual[2], wanted and find_spec("ray") is not None, once)
    given = [f"--{k}={v}" for k, v in vars(options).items() if type(v) is int]
    given += ["--quick"] * options.quick + ["--ray"] * bool(options.ray) + ["--no-ray"] * (options.ray is False)
    result["command"] = shlex.join(["python", "-m", "benchmarks.engines", *given])
    print(tables(result))
    folder = options.out or (None if options.quick else ROOT / "benchmarks" / "results")
    if folder is not None:
        write_json(folder / "engines.json", result)
        write_text(folder / "engines.md", tables(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
