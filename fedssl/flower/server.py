"""federate(): the round loop of every engine, and what happens before the first round and after the last."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedssl import partition, tree
from fedssl.aggregation.base import Memory
from fedssl.aggregation.plain import Plain
from fedssl.errors import ConfigError
from fedssl.evaluation import Evaluator
from fedssl.evaluation.monitor import Monitor
from fedssl.flower import checks, codec, state_files, strategy_state, turns
from fedssl.flower.aggregation.server import Server
from fedssl.flower.deploy import reminders
from fedssl.flower.deploy.roster import Roster, present, roster
from fedssl.flower.exchange import CohortGrid, exchange, instruct
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rule import PartRule, Trainer
from fedssl.flower.run.claims import claims, so_far
from fedssl.flower.run.finish import finish
from fedssl.flower.run.running import Running
from fedssl.flower.run.tally import Tally
from fedssl.job import Job, payload
from fedssl.job.provenance import manifest
from fedssl.job.setup import data_of, device_of, initial_model, shares_of, untrained, workshop_of
from fedssl.job.shards import described, parts_of
from fedssl.model import layout_of, to_arrays
from fedssl.participation.base import Attendance, Turn
from fedssl.parts import Arrays, Share
from fedssl.privacy import statement
from fedssl.progress import Reporter
from fedssl.rundir import Checkpoint, RunDirectory, split_table


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
        strategy = job.strategy()
        if isinstance(job.aggregation, Plain) and not job.aggregation.exact:
            strategy.exact = False
        checks.senders(job, run.data, strategy, run.shares)
        checks.received(strategy, run.shares)
        checks.architectures(job, run.data.train.shape, initial, run.shares)
        done, now = 0, {key: value for key, value in initial.items() if run.shares[key].comes}
        if isinstance(strategy, Trainer):
            strategy.prepare(workshop_of(job, run.device, run.data.train.shape))
            now = strategy.begin(now) if point is None else now
        if point is not None:
            saved = tree.like(point.arrays, initial)
            done, now = point.round, {key: saved[key] for key in now}  # in order: Flower's FedAvgM counts on it
            strategy_state.give(strategy, *point.strategy)
            run.aggregation.memory = Memory(*point.aggregation)
            run.history.models.update({at: tree.like(model, initial) for at, model in point.past.items()})
        run.history.models[done] = now
        run.history.merges.extend(int(row["round"]) for row in rundir.rows() if not row.get("skipped"))
        run.spent.update(statement.with_lost(rundir.rows("clients.jsonl"), rundir.rows("failures.jsonl")))
        run.aggregation.replay(rundir.attempts(), done)
        rundir.resumed(done)
        _restore_clients(run, done)
        run.aggregation.announce(reporter, sum(initial[key].size for key in run.merged))
        reporter.begin(rundir.path.name, done, job.federation.rounds)
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
        rundir.write("manifest.json", manifest(job, data, parts, device))
        if not isinstance(parts, partition.Elsewhere):
            table = split_table(parts, data.train.targets, data.classes)
            rundir.write("split.json", table | described(job, data, parts))
            if not isinstance(parts, partition.Drawn):  # a rule needs no file
                partition.write_split(rundir.path / partition.SPLIT_FILE, parts)
        rundir.write("payload.json", payload.manifest(job, data, parts))
    clients = job.federation.clients
    nodes = roster(grid, clients, job.federation.timeout_s, job.federation.enough(clients))
    evaluator = Evaluator(job, data, device)
    parameters = layout_of(model, job.method.parts).parameters
    monitor = Monitor(evaluator, parts, job.tree["method"], rundir.rows("collapse.jsonl"))
    about = (grid, job, rundir, reporter, evaluator, monitor, data, device, shares, parameters, nodes, state_dir)
    run = Running(*about, Server.begin(job, grid, nodes, model, rundir.secret))
    rundir.write("privacy.json", claims(run))
    return run, point, to_arrays(model)


def _student(strategy: Any) -> Arrays:
    """The arrays of the server's model that a strategy has trained itself."""
    return strategy.student if isinstance(strategy, Trainer) else {}


def _round(run: Running, strategy: Any, at: int, now: Arrays, initial: Arrays) -> Arrays:
    """Instruct who takes part, merge the replies, measure, log, checkpoint."""
    started = time.perf_counter()
    job = run.job
    measured = job.evaluate.every > 0 and at % job.evaluate.every == 0
    attendance, asynchronous = run.aggregation.attendance(at), job.participation.max_staleness > 0
    needed = job.federation.needed(len(attendance.turns))
    if len(attendance.turns) < needed:
        attendance = Attendance(())  # nobody is asked
    turn_of = {turn.client: turn for turn in attendance.arriving}
    absent = _absent(run, turn_of)
    turn_of = {client: turn for client, turn in turn_of.items() if client not in absent}
    shown = list(turn_of)[: job.evaluate.clients if run.aggregation.each else 0]
    watch = run.monitor.watch(at, initial, now | _student(strategy), shown) if measured else None

    def keep(client: int, arrays: Arrays) -> None:
        if watch is not None:
            watch.keep(client, arrays, _local_arrays(run, client) if client in watch.watched else {})

    def moved(client: int, arrays: Arrays) -> None:
        if watch is not None:
            watch.weights.add(client, arrays)  # the merge is compared with what was merged

    partition_of = {run.nodes[client]: client for client in turn_of}
    lacking = partial(_unsent, run, now=now)
    unpack = partial(job.compression.unpack, parameters=run.parameters)
    began = {turn.client: run.history.models[turn.start] for turn in turn_of.values()}
    counted = (list(turn_of), job.federation.tolerate, now, partition_of)
    tally = Tally(*counted, keep, moved, lacking, unpack, began, run.aggregation.each, job.federation.max_change)
    tally.lose(absent)
    merged = _merge(run, strategy, at, now, tally, turn_of if len(turn_of) >= needed or not absent else {})
    row: dict[str, Any] = {"round": at, "clients": tally.updates, "failures": len(tally.failures)}
    for sentence in tally.failures:
        run.reporter.say(f"round {at}: {sentence}")
    if merged is None:
        job.federation.skip(at, tally.updates, run.aggregation.skipped)
        row["skipped"], merged = True, now
        if run.aggregation.skipped:
            row["reason"] = run.aggregation.skipped
            run.reporter.say(f"round {at} is skipped: {run.aggregation.skipped}")
    else:
        run.history.merges.append(at)
    row |= tally.means(("loss", "drift")) | run.aggregation.row
    told = ({"client": client, "why": why, "asked": client in turn_of} for client, why in sorted(tally.failed.items()))
    failures = [{"round": at, **each} for each in told]
    run.spent.update(statement.spent(tally.rows))
    if failures and job.privacy.private:
        rows = [*run.rundir.rows("clients.jsonl"), *({"round": at, **r} for r in tally.rows)]
        gone = [*run.rundir.rows("failures.jsonl"), *failures]
        run.spent.update(statement.with_lost(rows, gone))
    row |= turns.summary(attendance, at, asynchronous)
    row["bytes_up"] = sum(r["bytes_up"] for r in tally.rows)
    asked = tally.bytes_down or not turn_of  # else too few were there to begin, and nobody was sent the model
    lost = len(attendance.turns) - len(turn_of) if asked else 0  # they were sent it, too
    row["bytes_down"] = tally.bytes_down + lost * job.compression.down_bytes(now, run.parameters)
    row["train_seconds"] = time.perf_counter() - started
    parts: list[dict[str, Any]] = []
    if measured or at == job.federation.rounds:
        row |= so_far(run)
    if watch is not None:
        measures, parts = run.monitor.close(watch, merged | _student(strategy), tally.rows)
        row |= measures
    row["seconds"] = time.perf_counter() - started
    run.history.add(at, merged, job.participation.max_staleness)
    if asynchronous:
        tally.rows = [{**r, "staleness": turn_of[int(r["client"])].staleness(at)} for r in tally.rows]
    run.rundir.log(row, [{"round": at, **r} for r in tally.rows], parts, failures)
    run.last.update({int(r["client"]): at for r in tally.rows if r.get("steps", 1)})
    if at % job.checkpoint_every == 0 or at == job.federation.rounds:
        _checkpoint(run, strategy, at, merged, [int(r["client"]) for r in tally.rows])
    run.reporter.round(at, row)
    for alarm in run.monitor.news(parts):
        run.reporter.say(alarm.line)
    return merged


def _merge(
    run: Running, strategy: Any, at: int, now: Arrays, tally: Tally, turn_of: Mapping[int, Turn]
) -> Arrays | None:
    """Instruct the clients of these turns and let the strategy merge what comes back; None if too little does."""
    job = run.job
    if not turn_of and run.aggregation.each:
        return None
    config = ConfigRecord({"job": job.text, "server-round": at, "made": run.history.made(at - 1)})
    attempt = run.rundir.attempt(at) if job.private else 1
    if job.private:
        lost = run.rundir.lost()
        config.update({"attempt": attempt, "lost-rounds": [r for r, _ in lost], "lost-attempts": [a for _, a in lost]})
    config.update(reminders.told(run, at))
    by_node = {run.nodes[client]: turn for client, turn in turn_of.items()}
    order = {node: i for i, node in enumerate(by_node)}
    messages = list(strategy.configure_train(at, codec.encode(now), config, CohortGrid(run.grid, list(order))))
    messages.sort(key=lambda message: order[message.metadata.dst_node_id])
    for message in messages:
        turn = by_node[message.metadata.dst_node_id]
        turns.instruct(message, turn, at, run.history)
        reminders.remind(run, message, turn.client)
    if not run.aggregation.open({key: now[key] for key in now if key in run.merged}, at, attempt, turn_of):
        tally.lose({client: why for client, why in sorted(run.aggregation.silent.items()) if client in turn_of})
        return None
    run.aggregation.instruct(messages, tally.partition_of)
    tally.bytes_down = instruct(messages, partial(job.compression.pack_down, parameters=run.parameters))
    replies = tally.watch(exchange(run.grid, messages, job.federation.timeout_s))
    replies = turns.catch_up(
        replies, by_node, at, run.history, job.participation.scale, job.method.summaries, tally.moved
    )
    if not run.aggregation.each:
        replies = run.aggregation.one(replies, tally.partition_of, tally.refuse)
    elif not isinstance(strategy, PartRule):
        # Flower's strategies add up in the order given; by partition it is the same on every engine.
        replies = iter(sorted(replies, key=lambda message: order[message.metadata.src_node_id]))
    needed = job.federation.needed(len(turn_of)) if run.aggregation.each else 1
    first = list(islice(replies, needed))  # before the strategy, whose state merging may change
    if len(first) < needed:
        return None
    record, _ = strategy.aggregate_train(at, chain(first, replies))
    if record is None:
        raise ConfigError(
            f"the strategy merged nothing in round {at}: it needs more clients than the {len(order)} asked; "
            "let more take part, or set federation.quorum to what it needs"
        )
    merged = tree.like(codec.decode(record), now)
    tree.check_same(merged, now, "the strategy's merge")
    return merged


def _absent(run: Running, turn_of: Mapping[int, Turn]) -> dict[int, str]:
    """The clients of these turns that have no node now, and why; too few are waited for as long as for replies."""
    if not (turn_of and isinstance(run.nodes, Roster)):
        return {}
    federation = run.job.federation
    there = present(run.nodes, turn_of, federation.enough(len(turn_of)), federation.timeout_s)
    return {client: run.nodes.why(client) for client in turn_of if client not in there}


def _unsent(run: Running, client: int, now: Arrays) -> frozenset[str]:
    """Those of the present arrays that a client does not send back."""
    received = {key for key in now if run.shares[key] is Share.received}
    return untrained(run.data, client, now) | received


def _local_arrays(run: Running, client: int) -> Arrays:
    """A client's own arrays of a shared process, so that a personal encoder is measured whole."""
    if not isinstance(run.grid, InProcessGrid):
        return {}
    return run.grid.states.state(run.nodes[client]).local


def _checkpoint(run: Running, strategy: Any, at: int, now: Arrays, clients: list[int]) -> None:
    if isinstance(run.grid, InProcessGrid):
        state_files.take(run.grid, run.nodes, None if run.job.checkpoint_every > 1 else clients, run.rundir.clients)
    past = {version: model for version, model in run.history.models.items() if version != at}
    memory = run.aggregation.memory
    run.rundir.checkpoint(Checkpoint(at, now, strategy_state.take(strategy), past, (memory.arrays, memory.numbers)))
    if isinstance(run.grid, InProcessGrid) and run.rundir.clients.exists():
        state_files.prune(run.rundir.clients, clients, at)


def _restore_clients(run: Running, done: int) -> None:
    """Give the clients of this process the states they had at the checkpoint."""
    if isinstance(run.grid, InProcessGrid):
        state_files.give(run.grid, run.nodes, run.rundir.clients, done)
        return
    rows = run.rundir.rows("clients.jsonl")
    run.last.update({int(row["client"]): int(row["round"]) for row in rows if row.get("steps", 1)})
    if done and run.state_dir is None:
        reminders.check(run)
