"""federate(): the round loop of every engine, and what happens before the first round and after the last."""

from __future__ import annotations

import gc
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fedssl import partition
from fedssl.aggregation.plain import Plain
from fedssl.errors import ConfigError
from fedssl.evaluation import Evaluator
from fedssl.evaluation.monitor import Monitor, Watch
from fedssl.flower import checks, turns
from fedssl.flower.aggregation.server import Aggregator
from fedssl.flower.deploy.roster import roster
from fedssl.flower.rule import Trainer
from fedssl.flower.run import checkpoints, merging, outcome
from fedssl.flower.run.claims import claims, so_far
from fedssl.flower.run.cohort import Cohort, cohort_of
from fedssl.flower.run.finish import finish
from fedssl.flower.run.running import Running
from fedssl.job import Job, payload
from fedssl.job.provenance import manifest, split_table
from fedssl.job.setup import data_of, device_of, initial_model, shares_of, workshop_of
from fedssl.job.shards import described, parts_of
from fedssl.model import layout_of, to_arrays
from fedssl.parts import Arrays, Share
from fedssl.progress import Reporter
from fedssl.rundir import Checkpoint, RunDirectory


@cache
def _spare() -> None:
    """Once in a process: let garbage collections pass over what has been imported, which takes up to half a second.

    Flower's robust strategies ask for one for every reply that they read.
    """
    gc.freeze()


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
    _spare()
    job.check()
    checks.holders(job)
    job.attendance(1)  # a trace that cannot be read ends the run before it begins
    with rundir.lock():
        run, point, initial = _open(grid, job, rundir, reporter, state_dir)
        strategy = _strategy(run, initial)
        done, now = _begin(run, strategy, point, initial)
        run.aggregation.announce(reporter, sum(initial[key].size for key in run.merged))
        reporter.begin(rundir.path.name, done, job.federation.rounds)
        rundir.new = False
        try:
            for at in range(done + 1, job.federation.rounds + 1):
                if not run.aggregation.affords(at, rundir.attempts().count(at) + 1):
                    reporter.say(f"round {at} would exceed the privacy budget: the run ends before it")
                    break
                now = _round(run, strategy, at, now, initial)
        finally:
            reporter.end()
        return finish(run, initial, now | _student(strategy))


def _open(
    grid: Grid, job: Job, rundir: RunDirectory, reporter: Reporter, state_dir: Path | None
) -> tuple[Running, Checkpoint | None, Arrays]:
    """What the rounds share, the checkpoint to start from, and all initial arrays."""
    device = device_of(job)
    data = data_of(job, device)
    checks.sites(job, data)
    parts = parts_of(job, device)
    model = initial_model(job, data.train.shape)
    shares = shares_of(job, model)
    checks.start(job, shares)
    if Share.merge not in shares.values():
        raise ConfigError("every part is local or derived, so nothing would be federated: let at least one part merge")
    point = rundir.latest()
    if point is None:
        _describe(job, rundir, data, parts, device)
    clients = job.federation.clients
    nodes = roster(grid, clients, job.federation.timeout_s, job.federation.enough(clients))
    evaluator = Evaluator(job, data, device)
    run = Running(
        grid=grid,
        job=job,
        rundir=rundir,
        reporter=reporter,
        evaluator=evaluator,
        monitor=Monitor(evaluator, parts, job.tree["method"], rundir.rows("collapse.jsonl")),
        data=data,
        device=device,
        shares=shares,
        parameters=layout_of(model, job.method.parts).parameters,
        nodes=nodes,
        state_dir=state_dir,
        aggregation=Aggregator.begin(job, grid, nodes, model, rundir.secret),
    )
    rundir.write("privacy.json", claims(run))
    return run, point, to_arrays(model)


def _describe(job: Job, rundir: RunDirectory, data: Any, parts: partition.Parts, device: torch.device) -> None:
    """Write what a run is made with, before it begins: the manifest, the split, and what leaves a client."""
    rundir.write("manifest.json", manifest(job, data, parts, device))
    if not isinstance(parts, partition.Elsewhere):
        table = split_table(parts, data.train.targets, data.classes)
        rundir.write("split.json", table | described(job, data, parts))
        if not isinstance(parts, partition.Drawn):  # a rule needs no file
            partition.write_split(rundir.path / partition.SPLIT_FILE, parts)
    rundir.write("payload.json", payload.manifest(job, data, parts))


def _strategy(run: Running, initial: Arrays) -> Any:
    """The strategy, if it can merge what the clients will send."""
    job = run.job
    strategy = job.strategy()
    if isinstance(job.aggregation, Plain) and not job.aggregation.exact:
        strategy.exact = False
    checks.senders(job, run.data, strategy, run.shares)
    checks.received(strategy, run.shares)
    checks.architectures(job, run.data.train.shape, initial, run.shares)
    return strategy


def _begin(run: Running, strategy: Any, point: Checkpoint | None, initial: Arrays) -> tuple[int, Arrays]:
    """The last round that is done, and the merged arrays after it, with all that the next one builds on in place."""
    done, now = 0, {key: value for key, value in initial.items() if run.shares[key].comes}
    if isinstance(strategy, Trainer):
        strategy.prepare(workshop_of(run.job, run.device, run.data.train.shape))
        now = strategy.begin(now) if point is None else now
    if point is not None:
        done, now = point.round, checkpoints.give(run, strategy, point, now, initial)
    run.history.models[done] = now
    run.history.merges.extend(int(row["round"]) for row in run.rundir.rows() if not row.get("skipped"))
    run.heard.add(run.rundir.rows("clients.jsonl"), run.rundir.rows("failures.jsonl"))
    run.spent.update(run.heard.with_lost())
    run.aggregation.replay(run.rundir.attempts(), done)
    run.rundir.resumed(done)
    checkpoints.give_clients(run, done)
    return done, now


def _student(strategy: Any) -> Arrays:
    """The arrays of the server's model that a strategy has trained itself."""
    return strategy.student if isinstance(strategy, Trainer) else {}


def _round(run: Running, strategy: Any, at: int, now: Arrays, initial: Arrays) -> Arrays:
    """Ask who takes part, merge what they send, account for it, measure it, and leave it in the run's directory."""
    started = time.perf_counter()
    cohort = cohort_of(run, at)
    watch = _watch(run, strategy, cohort, now, initial)
    tally = merging.expect(run, cohort, now, watch)
    tally.lose(cohort.absent)
    merged = merging.merge(run, strategy, cohort, now, tally)
    row = outcome.counted(run, at, tally, skipped=merged is None)
    if merged is None:
        merged = now
    else:
        run.history.merges.append(at)
    failures = outcome.failures(cohort, tally)
    outcome.spend(run, at, tally.rows, failures)
    row |= turns.summary(cohort.attendance, at, run.asynchronous) | outcome.traffic(run, cohort, tally, now)
    row["train_seconds"] = time.perf_counter() - started
    if watch is not None or at == run.job.federation.rounds:
        row |= so_far(run)
    parts: list[dict[str, Any]] = []
    if watch is not None:
        measures, parts = run.monitor.close(watch, merged | _student(strategy), tally.rows)
        row |= measures
    row["seconds"] = time.perf_counter() - started
    run.history.add(at, merged, run.job.participation.max_staleness)
    run.rundir.log(row, outcome.replies(run, cohort, tally), parts, failures)
    run.last.update({int(r["client"]): at for r in tally.rows if r.get("steps", 1)})
    if at % run.job.checkpoint_every == 0 or at == run.job.federation.rounds:
        checkpoints.take(run, strategy, at, merged, [int(r["client"]) for r in tally.rows])
    run.reporter.round(at, row)
    for alarm in run.monitor.news(parts):
        run.reporter.say(alarm.line)
    return merged


def _watch(run: Running, strategy: Any, cohort: Cohort, now: Arrays, initial: Arrays) -> Watch | None:
    """What is kept of a round to measure it; None if it is none of those that are measured."""
    evaluate = run.job.evaluate
    if not evaluate.every or cohort.at % evaluate.every:
        return None
    shown = list(cohort.turns)[: evaluate.clients if run.aggregation.each else 0]
    return run.monitor.watch(cohort.at, initial, now | _student(strategy), shown)
