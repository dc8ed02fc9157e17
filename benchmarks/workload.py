"""The workload that the engines are compared on, and one measurement of it in a process of its own.

SimCLR on drawn images, one local epoch of SGD with momentum, FedAvg. Nothing is evaluated inside the rounds and only
the last round writes a checkpoint, so that engines are compared and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import age_s, cpu_s, watched_memory
from fedssl import config, seeds, tree
from fedssl.client import fit
from fedssl.config import Plan
from fedssl.gradient import PlainGradient
from fedssl.job import Job
from fedssl.job.setup import build_model, data_of, device_of
from fedssl.job.shards import shard_of
from fedssl.method import Batch, Step
from fedssl.model import load_arrays, to_arrays
from fedssl.parts import Arrays
from fedssl.progress import Reporter

ROOT = Path(__file__).resolve().parents[1]
BARE, BY_HAND, PFL, RAY = "bare loop", "FedAvg by hand", "pfl-research", "ray, 2 cpus"
ONE = ("engine=in_process", "engine.workers=1")
TWO = ("engine=processes", "engine.workers=2")
SYSTEMS = {  # name: overrides of the engine
    BARE: (),
    BY_HAND: (),
    PFL: (),
    "in_process, 1 worker": ONE,
    "in_process, 2 workers": ("engine=in_process", "engine.workers=2"),
    "processes, 2 workers": TWO,
    "processes, 2 workers, cohort=16": (*TWO, "engine.cohort=16"),
    "in_process, cohort=16": (*ONE, "engine.cohort=16"),
    "in_process, cohort=auto": (*ONE, "engine.cohort=auto"),
    RAY: ("engine=ray", "engine.cpus=2", "engine.cpus_per_client=1"),
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
    encoder: str = "conv4"
    sampled: int = 0  # clients a round; 0 = all
    device: str = "cpu"

    def plan(self, system: str, folder: Path) -> Plan:
        """The run of this workload on one system; the job is the same for all."""
        few = (f"participation.fraction={self.sampled / self.clients}",) if self.sampled else ()
        shared = ("engine.gpus_per_client=0.5",) if self.device != "cpu" and system == RAY else ()
        return config.compose(
            [
                *("method=simclr", f"encoder={self.encoder}", f"encoder.width={self.width}", "partition=iid", *few),
                *("data=synthetic", f"data.train={self.clients * self.examples}", "data.test=16"),
                *(f"data.size={self.size}", "local.epochs=1", f"local.batch_size={self.batch_size}"),
                *("local.optimizer=sgd", "local.lr=0.05"),
                *(f"federation.clients={self.clients}", f"federation.rounds={self.rounds}"),
                *("evaluate.every=0", "evaluate.final=false", "checkpoint_every=1000000"),
                *(f"device={self.device}", "threads=1", f"out={folder}", "name=run", *SYSTEMS[system], *shared),
            ]
        )


def bare(job: Job, reporter: Reporter) -> Arrays:
    """The same training with no federation around it: one model, one thread, one running mean."""
    torch.set_num_threads(job.threads)
    device = device_of(job)
    shards = [shard_of(job, client, device) for client in range(job.federation.clients)]
    model = build_model(job, data_of(job, device).train.shape).to(device)
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


def by_hand(job: Job, reporter: Reporter) -> Arrays:
    """The loop that people write themselves: a copy of the model a client, torch's optimiser, a mean of states.

    Its numbers are drawn by its own generator, so it takes equal steps on other views.
    """
    torch.set_num_threads(job.threads)
    device, local, rounds = device_of(job), job.local, job.federation.rounds
    shards = [shard_of(job, client, device) for client in range(job.federation.clients)]
    model = build_model(job, data_of(job, device).train.shape).to(device)
    generator, examples = seeds.torch_stream(job.seed, "by hand", device=device), sum(map(len, shards))
    reporter.begin(BY_HAND, 0, rounds)
    for at in range(1, rounds + 1):
        mean: dict[str, torch.Tensor] = {}
        for shard in shards:
            own = copy.deepcopy(model).train()
            descent = torch.optim.SGD(own.parameters(), local.lr, local.momentum, weight_decay=local.weight_decay)
            for index in torch.randperm(len(shard), generator=generator, device=device).split(local.batch_size):
                views = job.data.augment.views(shard.batch(index), generator, job.method.views)
                descent.zero_grad()
                job.method.loss(own, Batch(list(views), index), Step(at, rounds, 0, 1)).loss.backward()  # type: ignore[no-untyped-call]
                descent.step()
            for name, value in own.state_dict().items():
                mean[name] = mean.get(name, 0) + value * (len(shard) / examples)
        model.load_state_dict(mean)
        reporter.round(at, {})
    return to_arrays(model)


def train(system: str, work: Work, folder: Path, clock: Reporter) -> Arrays:
    """Run one system; returns its last arrays."""
    plan = work.plan(system, folder)
    if system in (BARE, BY_HAND):
        return (bare if system == BARE else by_hand)(plan.job, clock)
    if system == PFL:
        from benchmarks.pfl_research import federate

        return federate(plan.job, clock)
    rundir = plan.open()
    plan.build_engine().run(plan.job, rundir, clock)
    point = rundir.latest()
    if point is None:
        raise RuntimeError(f"{system} left no checkpoint")
    return point.arrays


def measure(system: str, work: Work) -> dict[str, Any]:
    """Run one system here and now: one row of results."""
    with tempfile.TemporaryDirectory() as folder, watched_memory(0.1) as samples:
        clock = Clock()
        ready_s, start = age_s(), time.perf_counter()
        arrays = train(system, work, Path(folder), clock)
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
        "flop": flop(work),
        **({} if work.device == "cpu" else {"peak_gpu_mib": torch.cuda.max_memory_allocated(work.device) / 2**20}),
        **clock.sent,
    }


def flop(work: Work) -> int:
    """Floating-point operations of one step: forward and backward pass of both views of a batch."""
    with tempfile.TemporaryDirectory() as folder:
        job = work.plan(BARE, Path(folder)).job
    model, index = build_model(job, (3, work.size, work.size)).train(), torch.arange(work.batch_size)
    views = [torch.rand(work.batch_size, 3, work.size, work.size, generator=seeds.torch_stream(0, "flop"))] * 2
    with FlopCounterMode(display=False) as counted:
        job.method.loss(model, Batch(views, index), Step(1, 1, 0, 1)).loss.backward()  # type: ignore[no-untyped-call]
    return counted.get_total_flops()


def difference(system: str, work: Work) -> dict[str, Any]:
    """How far the last arrays of a system are from the bare loop's: of all, of what training moved, of the worst."""
    with tempfile.TemporaryDirectory() as folder:
        mine = train(system, work, Path(folder), Clock())
        floor = train(BARE, work, Path(folder), Clock())
        began = to_arrays(build_model(work.plan(BARE, Path(folder)).job, (3, work.size, work.size)))
    norm = np.linalg.norm
    away, size, moved = np.array([(norm(mine[k] - v), norm(v), norm(v - began[k])) for k, v in floor.items()]).T
    return {
        "system": system,
        "difference": float(norm(away) / norm(size)),
        "of_the_movement": float(norm(away) / norm(moved)),
        "worst_array": float(max(away[size > 0] / size[size > 0])),
    }


def digest(arrays: Arrays) -> str:
    """The SHA-256 of all names, types, shapes and values."""
    total = hashlib.sha256()
    for key in sorted(arrays):
        value = arrays[key]
        total.update(f"{key} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return total.hexdigest()


class Clock(Reporter):
    """Notes wall and CPU seconds when the first client may start and when each round ends; shows nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stamps: list[tuple[float, float]] = []
        self.sent: dict[str, int] = {}

    def begin(self, title: str, done: int, rounds: int) -> None:
        """The first client starts now."""
        self.stamps.append((time.perf_counter(), cpu_s()))

    def round(self, number: int, row: Mapping[str, Any]) -> None:
        """A round has ended."""
        self.stamps.append((time.perf_counter(), cpu_s()))
        self.sent = {key: row[key] for key in ("bytes_up", "bytes_down") if key in row}


def fresh(name: str, work: Work, beside: Path | None = None) -> dict[str, Any]:
    """One measurement in a process of its own; see `here`. It finds the packages of the folder `beside`, too."""
    command = [sys.executable, "-m", "benchmarks.workload", name, json.dumps(asdict(work))]
    with tempfile.TemporaryDirectory() as home:
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, (ROOT, beside)))),
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
    """One measurement in this process: of a system, or what goes before its name and a colon."""
    from benchmarks.empty import measure_empty
    from benchmarks.heap import GIVEN_BACK, given_back
    from benchmarks.steps import measure_step

    kind, _, system = name.rpartition(": ")
    kinds = {
        "": measure,
        "empty": measure_empty,
        "difference": difference,
        "step": measure_step,
        GIVEN_BACK: given_back,
    }
    return kinds[kind](system, work)


def main(arguments: Sequence[str] | None = None) -> int:
    """What `fresh` calls: print one row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workload")
    parser.add_argument("name")
    parser.add_argument("work", type=json.loads)
    chosen = parser.parse_args(arguments)
    print(json.dumps(here(chosen.name, Work(**chosen.work))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
