"""federate(): the round loop of every engine, and what happens before the first round and after the last."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedssl import partition, tree
from fedssl.baselines import central
from fedssl.client import FitResult
from fedssl.errors import ConfigError, ResumeError
from fedssl.evaluation import Evaluator
from fedssl.export import save_encoder
from fedssl.flower import codec, state_files, strategy_state
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rounds import CohortGrid, Tally, cohort, exchange, roster
from fedssl.flower.rule import PartRule
from fedssl.job import Job, split
from fedssl.model import to_arrays
from fedssl.parts import Arrays, Share
from fedssl.progress import Reporter
from fedssl.rundir import Checkpoint, RunDirectory, git_commit, split_table
from fedssl.setup import build_model, data_of, device_of, shares_of, untrained


@dataclass(frozen=True)
class _Run:
    """What the rounds share."""

    grid: Grid
    job: Job
    rundir: RunDirectory
    reporter: Reporter
    evaluator: Evaluator
    data: Any
    device: torch.device
    shares: Mapping[str, Share]  # of every array of the model
    nodes: Mapping[int, int]  # partition -> node id
    state_dir: Path | None  # where clients outside this process keep their state, if they share our disk


def federate(
    grid: Grid, job: Job, rundir: RunDirectory, reporter: Reporter, state_dir: Path | None = None
) -> dict[str, Any]:
    """Run a job from where its directory stands to its end, and return the summary.

    Args:
        grid: the nodes; each partition of the job needs one.
        job: what to run.
        rundir: opened for this job; a begun run is resumed from its last checkpoint.
        reporter: shows progress.
        state_dir: for runtimes of Flower that forget a client's Context when their process ends.

    Raises:
        FedsslError: for everything a person can mend; finished rounds stay in the directory.
    """
    torch.set_num_threads(job.threads)
    job.check()
    with rundir.lock():
        run, point, initial = _open(grid, job, rundir, reporter, state_dir)
        strategy = job.strategy()
        _check_senders(run, strategy)
        done, now = 0, {key: value for key, value in initial.items() if run.shares[key] is Share.merge}
        if point is not None:
            done, now = point.round, tree.like(point.arrays, initial)
            strategy_state.give(strategy, *point.strategy)
        _restore_clients(run, done)
        reporter.begin(rundir.path.name, done, job.federation.rounds)
        try:
            for at in range(done + 1, job.federation.rounds + 1):
                now = _round(run, strategy, at, now, initial)
        finally:
            reporter.end()
        return _finish(run, initial | now)


def _open(
    grid: Grid, job: Job, rundir: RunDirectory, reporter: Reporter, state_dir: Path | None
) -> tuple[_Run, Checkpoint | None, Arrays]:
    """What the rounds share, the checkpoint to start from, and all initial arrays."""
    device = device_of(job)
    data = data_of(job, device)
    parts = split(job, data.train)
    model = build_model(job, data.train.shape)
    shares = shares_of(job, model)
    if Share.merge not in shares.values():
        raise ConfigError("every part is local or derived, so nothing would be federated: let at least one part merge")
    point = rundir.latest()
    if point is None:
        rundir.write("manifest.json", _manifest(job, data, parts, device))
        rundir.write("split.json", split_table(parts, data.train.targets, data.classes))
    nodes = roster(grid, job.federation.clients, job.federation.timeout_s)
    evaluator = Evaluator(job, data, device)
    run = _Run(grid, job, rundir, reporter, evaluator, data, device, shares, nodes, state_dir)
    return run, point, to_arrays(model)


def _check_senders(run: _Run, strategy: Any) -> None:
    """Refuse a strategy that merges whole models only, if some client will send a part of one."""
    if isinstance(strategy, PartRule) and strategy.reads == "mean":
        return
    merged = [key for key, share in run.shares.items() if share is Share.merge]
    short = [c for c in range(run.job.federation.clients) if untrained(run.data, c, merged)]
    if short:
        raise ConfigError(
            f"client {short[0]} lacks a modality and sends no arrays of its tower, but {type(strategy).__name__} "
            "merges whole models only: use strategy=fedavg, or give every client both (data.holds=[both])"
        )


def _round(run: _Run, strategy: Any, at: int, now: Arrays, initial: Arrays) -> Arrays:
    """Instruct a cohort, merge its replies, measure, log, checkpoint."""
    started = time.perf_counter()
    job = run.job
    measured = job.evaluate.every > 0 and at % job.evaluate.every == 0
    chosen = cohort(job.federation, job.seed, at)
    watched = set(chosen[: job.evaluate.clients]) if measured else set()
    encoders: dict[int, Arrays] = {}

    def keep(client: int, arrays: Arrays) -> None:
        if client in watched:
            own = {k: v for k, v in arrays.items() if k.startswith("encoder.")}
            encoders[client] = initial | now | own | _local_arrays(run, client)

    partition_of = {node: p for p, node in run.nodes.items()}
    tally = Tally(chosen, job.federation.tolerate, now, partition_of, keep, lambda c: untrained(run.data, c, now))
    merged = _merge(run, strategy, at, now, tally)
    row: dict[str, Any] = {"round": at, "clients": len(tally.rows), "failures": len(tally.failures)}
    row |= {key: tally.mean(key) for key in ("loss", "drift")}
    row["bytes_up"] = sum(r["bytes_up"] for r in tally.rows)
    row["bytes_down"] = tree.size_bytes(now) * len(chosen)
    row["train_seconds"] = time.perf_counter() - started
    if measured:
        row |= run.evaluator.merged(initial | merged)
        if encoders:
            row |= run.evaluator.clients([encoders[c] for c in sorted(encoders)], row)
    row["seconds"] = time.perf_counter() - started
    run.rundir.log(row, [{"round": at, **r} for r in tally.rows])
    if at % job.checkpoint_every == 0 or at == job.federation.rounds:
        _checkpoint(run, strategy, at, merged, [int(r["client"]) for r in tally.rows])
    run.reporter.round(at, row)
    return merged


def _merge(run: _Run, strategy: Any, at: int, now: Arrays, tally: Tally) -> Arrays:
    """Send the present arrays to the tally's cohort and let the strategy merge what comes back."""
    job = run.job
    config = ConfigRecord({"job": job.text, "server-round": at})
    if run.state_dir is not None:
        config["state-dir"] = str(run.state_dir)
        config["checkpoint"] = (at - 1) // job.checkpoint_every * job.checkpoint_every
    order = {run.nodes[p]: i for i, p in enumerate(tally.expected)}
    messages = list(strategy.configure_train(at, codec.encode(now), config, CohortGrid(run.grid, list(order))))
    messages.sort(key=lambda message: order[message.metadata.dst_node_id])
    replies = tally.watch(exchange(run.grid, messages, job.federation.timeout_s))
    if not isinstance(strategy, PartRule):
        # Flower's strategies add up in the order given; by partition it is the same on every engine.
        replies = iter(sorted(replies, key=lambda message: order[message.metadata.src_node_id]))
    record, _ = strategy.aggregate_train(at, replies)
    if record is None:
        raise ConfigError(
            f"the strategy merged nothing in round {at}: it needs more clients than the {len(order)} asked"
        )
    merged = tree.like(codec.decode(record), now)
    tree.check_same(merged, now, "the strategy's merge")
    return merged


def _local_arrays(run: _Run, client: int) -> Arrays:
    """A client's own arrays of a shared process, so that a personal encoder is measured whole."""
    if not isinstance(run.grid, InProcessGrid):
        return {}
    return codec.ClientState.load(run.grid.context(run.nodes[client])).local


def _checkpoint(run: _Run, strategy: Any, at: int, now: Arrays, clients: list[int]) -> None:
    if isinstance(run.grid, InProcessGrid):
        for client in _changed_since_checkpoint(run, clients):
            state = codec.ClientState.load(run.grid.context(run.nodes[client]))
            if not state.empty:
                state_files.write(run.rundir.clients, client, state)
    run.rundir.checkpoint(Checkpoint(at, now, strategy_state.take(strategy)))
    if isinstance(run.grid, InProcessGrid) and run.rundir.clients.exists():
        for client in clients:
            state_files.prune(run.rundir.clients, client, at)


def _changed_since_checkpoint(run: _Run, clients: list[int]) -> list[int]:
    """This round's clients, and with rarer checkpoints all that have taken part: their files may be older."""
    if run.job.checkpoint_every == 1 or not isinstance(run.grid, InProcessGrid):
        return clients
    return sorted(node - 1 for node in run.grid.contexts)


def _restore_clients(run: _Run, done: int) -> None:
    """Give the clients of this process the states they had at the checkpoint."""
    if isinstance(run.grid, InProcessGrid):
        for path in sorted(run.rundir.clients.glob("*.safetensors")):
            client, _, last = path.stem.partition("-")
            if int(last) <= done:  # sorted, so a newer file of the same client comes later and wins
                state_files.read(path).save(run.grid.context(run.nodes[int(client)]))
    elif done and run.state_dir is None and Share.local in run.shares.values():
        raise ResumeError(
            "this run keeps parts on its clients, and this Flower runtime has forgotten them: "
            "resume it with `fedssl resume`, or start it anew"
        )


def _finish(run: _Run, arrays: Arrays) -> dict[str, Any]:
    """Final probes, baselines, the encoder's files and the summary; repeated if a kill interrupts it."""
    job, rundir, evaluator = run.job, run.rundir, run.evaluator
    rows = rundir.rows()
    last = rows[-1]
    save_encoder(rundir.path, job, run.data.train.shape, arrays)
    final = evaluator.merged(arrays)
    started = time.perf_counter()
    probes: dict[str, dict[str, float]] = {}
    spectra = {"federated": evaluator.spectrum(arrays)}
    if job.evaluate.final and evaluator.labelled:
        run.reporter.say("measuring the encoder: linear and few-label probes")
        probes["federated"] = evaluator.probe(arrays)
        random = evaluator.random_encoder()
        probes["random encoder"], spectra["random encoder"] = evaluator.probe(random), evaluator.spectrum(random)
    if job.baselines:
        whole = _central(run)
        spectra["central"] = evaluator.spectrum(whole)
        probes["central"] = evaluator.probe(whole)
        probes |= evaluator.without_encoder()
    rundir.write("probes.json", {"probes": probes, "spectra": spectra})
    mine = probes.pop("federated", {})
    summary = {
        "rounds": int(last["round"]),
        "loss": last["loss"],
        **final,
        **mine,
        **{
            f"{name.replace(' ', '_')}_{key}": value
            for name, values in probes.items()
            for key, value in values.items()
            if key.endswith("accuracy")
        },
        "epsilon": None,
        "seconds": float(sum(row["seconds"] for row in rows)),
        "final_seconds": time.perf_counter() - started,
        "bytes_up": int(sum(row["bytes_up"] for row in rows)),
        "bytes_down": int(sum(row["bytes_down"] for row in rows)),
    }
    for key in ("knn_accuracy", "linear_accuracy", "random_encoder_linear_accuracy"):
        summary.setdefault(key, None)  # unlabelled data: nothing to measure them on
    rundir.write("summary.json", summary)
    return summary


def _central(run: _Run) -> Arrays:
    """The central baseline, with its progress."""

    def tick(at: int, rounds: int, result: FitResult) -> None:
        if at == 1:
            run.reporter.begin("central baseline", 0, rounds)
        run.reporter.round(at, {"loss": result.loss})

    try:
        return central(run.job, run.data.train, run.device, tick)
    finally:
        run.reporter.end()


def _manifest(job: Job, data: Any, parts: list[np.ndarray], device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made."""
    commit = git_commit(Path(__file__).resolve().parents[2])
    return {
        "fedssl": version("fedssl"),
        **({"git_commit": commit} if commit else {}),
        "versions": {name: version(name) for name in ("torch", "flwr", "numpy", "scikit-learn")},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch_threads": job.threads,
        "seed": job.seed,
        "job": job.fingerprint,
        "examples": {"train": len(data.train), "test": len(data.test)},
        "split": {
            "fingerprint": partition.fingerprint(parts),
            **partition.heterogeneity(parts, data.train.targets),
        },
    }
