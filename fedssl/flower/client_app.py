"""The Flower ClientApp: the same in one process, in Flower's simulation and on a device.

A client needs the message, its own Context and its data, nothing else.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedssl import seeds, tree
from fedssl.aggregation.base import Sender
from fedssl.client import Pull, fit
from fedssl.edge.limits import Limits
from fedssl.flower import codec
from fedssl.flower.aggregation import clients
from fedssl.flower.codec import KEEPS, ClientState, Memo, remember_step, step_seconds
from fedssl.flower.deploy import growing, memory, site
from fedssl.flower.rule import Own, PartRule
from fedssl.flower.run import trust
from fedssl.job import Job, parse, payload
from fedssl.job.setup import build_model, device_of, public_of, shares_of, untrained
from fedssl.model import Model, derive, layout_of, load_arrays, to_arrays
from fedssl.parts import Arrays, Layout, Share, part_of
from fedssl.privacy.record_dp import Planned
from fedssl.privacy.spending import agree, pay, pay_turn

app = ClientApp()
_LOG = logging.getLogger("fedssl")


class _Worker(threading.local):
    """One model a thread, used again for each client that the thread trains."""

    text: str = ""
    admitted: str = ""  # the text of the model that has been looked at
    model: Model
    initial: Arrays
    shares: dict[str, Share]
    layout: Layout
    rule: PartRule | None  # the strategy if it has a client side, which keeps no state


_worker = _Worker()


def _prepare(job: Job, client: int, shape: tuple[Any, ...], examples: int, device: torch.device) -> _Worker:
    sized = any(part.sized for part in job.method.parts)
    text = f"{device}:{job.encoder_name(client)}:{examples if sized else 0}:{job.text}"
    if _worker.text != text:
        model = build_model(job, shape, examples, client)
        _worker.shares = shares_of(job, model)
        _worker.layout = layout_of(model, job.method.parts)
        _worker.initial = to_arrays(model)
        _worker.model = model.to(device)
        strategy = job.strategy()
        _worker.rule = strategy if isinstance(strategy, PartRule) else None
        _worker.text = text
    return _worker


def _load(
    worker: _Worker, job: Job, now: Arrays, state: ClientState, at: int, client: int
) -> tuple[Arrays, Memo, list[str]]:
    """Fill the worker's model for this client.

    Returns:
        The merged parts as they start, the strategy's memo, and the names of the local arrays.
    """
    start, memo = now, state.memo
    if worker.rule is not None:
        own = Own(state.mine, state.memo, state.round, client)
        start, memo = worker.rule.receive(now, own, at, worker.layout)
    local = [key for key, share in worker.shares.items() if share is Share.local]
    load_arrays(worker.model, {key: worker.initial[key] for key in local} | state.local)
    load_arrays(worker.model, start)  # after the local ones: a rule may refresh a local teacher
    derive(worker.model, job.method.parts, [key for key, share in worker.shares.items() if share is Share.derived])
    return {key: start.get(key, value) for key, value in now.items()}, memo, local


def _pull(worker: _Worker) -> Pull | None:
    """The strategy's proximal term over the parameters that it merges."""
    if worker.rule is None or not worker.rule.proximal:
        return None
    shared = [p for key, p in worker.model.named_parameters() if worker.shares[key] is Share.merge and p.requires_grad]
    return Pull.towards_now(worker.rule.proximal, shared)


def _shares(job: Job, client: int, config: ConfigRecord) -> dict[tuple[int, int], float]:
    """By round and attempt: the share of a round that this client was asked for in what a kill has lost.

    Where cohorts are secret it does not know which of them it was in, and counts all.
    """
    lost = clients.lost(config)
    if job.aggregation.secret_cohorts:
        return dict.fromkeys(lost, 1.0)
    turns = [(at, attempt, turn) for at, attempt in lost for turn in job.attendance(at).turns]
    return {(at, attempt): turn.work for at, attempt, turn in turns if turn.client == client}


def _weights(job: Job, arrays: Arrays) -> Arrays:
    """Those of all arrays that are no summaries of data."""
    return {key: value for key, value in arrays.items() if part_of(key) not in job.method.summaries}


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training: read the job, restore, receive, fit, save, reply."""
    config = codec.config_of(message.content)
    job, at = parse(str(config["job"])), int(config["server-round"])  # type: ignore[arg-type]  # a ConfigRecord is loose
    trust.check(job, config, context)
    # Of this turn: in which round it began, which one made the model that it began with, which share of steps it does.
    begun = int(config.get("begun", at))  # type: ignore[arg-type]
    made, work = int(config.get("made", begun - 1)), float(config.get("work", 1.0))  # type: ignore[arg-type]
    attempt = int(config.get("attempt", 1))  # type: ignore[arg-type]  # how often this round has been begun
    client = site.client_of(context.node_config)
    limits = Limits.of(context.node_config)
    allowance = limits.allowance()
    if declined := limits.declined():
        _LOG.warning("this node takes no step in round %d: %s", at, declined)
        work = 0.0
    device = device_of(job)
    # Not only at start: the number of threads is a property of each thread, and Flower brings its own.
    torch.set_num_threads(job.threads)
    data, shard = site.holds(job, client, context.node_config, device)
    worker = _prepare(job, client, data.train.shape, len(shard), device)
    memory.restore(config, context, client, at)
    state = ClientState.load(context)
    if "data-dir" in context.node_config:
        sized = [part.name for part in job.method.parts if part.sized]
        state = growing.follow(state, shard, sized, worker.initial)

    told = {key: value for key, value in worker.initial.items() if worker.shares[key].comes}
    wire = codec.decode(codec.arrays_of(message.content))
    now = job.compression.unpack_down(wire, told, worker.layout.parameters)
    start, memo, local = _load(worker, job, now, state, made + 1, client)
    if worker.admitted != worker.text:
        job.privacy.admit(job.method, worker.model, shard, job.data.augment)
        worker.admitted = worker.text
    rounds = 0.0
    if job.privacy.private:
        rounds = job.federation.rounds if job.aggregation.secret_cohorts else job.rounds_of(client)
    gradient = job.privacy.planned(len(shard), job.local.batch_size, job.local.epochs, rounds)
    agree(gradient, context.node_config, job.aggregation, job.planned, clients.lost(config))
    lost = _shares(job, client, config)
    if allowance is not None and isinstance(gradient, Planned):  # what is paid for is chosen before, not by the clock
        work, allowance = min(work, allowance.share(gradient.steps, step_seconds(context))), None
    paid = pay(gradient, state.ledger, at, attempt, work, lost)
    words, floor = clients.told(config), context.node_config
    own = pay_turn(job.aggregation, job.planned, state.own, (at, attempt), lost, words, floor)
    replace(state, ledger=paid.ledger.text(), own=own).save(context)  # before a step is taken, not after
    began = time.monotonic()
    result = fit(
        job.method,
        worker.model,
        shard,
        job.data.augment,
        job.local,
        gradient=gradient,
        round=begun,
        rounds=job.federation.rounds,
        seed=job.seed,
        client=client,
        public=public_of(job, device),
        pull=_pull(worker),
        work=paid.work,
        attempt=attempt,
        allowance=allowance,
    )
    if limits.seconds is not None and result.steps:
        remember_step(context, (time.monotonic() - began) / result.steps)
    metrics: dict[str, float | int] = {
        codec.WEIGHT: result.examples if gradient.weight is None else gradient.weight,
        "partition-id": client,
        "steps": result.steps,
        "work": result.work,
        **paid.public,
    }
    sender = Sender(client, at, attempt, result.examples, job.seed)
    asked = {key: value for key, value in now.items() if worker.shares.get(key) is Share.merge}
    if not result.steps:  # no time for a single one: nothing has changed, and there is nothing to send
        content = codec.reply({}, metrics)
        if not job.aggregation.each:  # that, too, is nobody's business
            content = clients.reply(job, config, sender, {}, asked, context, paid.public)
        return Message(content, reply_to=message)
    trained = to_arrays(worker.model, [key for key in now if worker.shares.get(key) is not Share.received])
    mine: Arrays = {}
    if worker.rule is not None:
        memo = worker.rule.remember(start, trained, memo, worker.layout)
        mine = {key: value for key, value in trained.items() if part_of(key) in worker.rule.keeps}
    drift = math.sqrt(tree.squared_distance(_weights(job, trained), now))
    metrics = {**result.movement, **metrics, "drift": drift}  # functions of the weights: as private as they are
    if not gradient.private:
        metrics = {**result.measures, **metrics, "loss": result.loss, "feature_std": result.feature_std}
    lacking = untrained(data, client, trained)
    sent = {key: value for key, value in trained.items() if key not in lacking}
    known = payload.uploads(job, data.train.shape)
    payload.check_reply(known, sent, metrics, [*result.measures, *result.movement])
    if not job.aggregation.each:
        kept = ClientState(to_arrays(worker.model, local), mine, memo, at, {}, paid.ledger.text(), own, state.examples)
        kept.save(context)
        memory.keep(config, context, client)
        content = clients.reply(job, config, sender, sent, asked, context, paid.public)
        return Message(content, reply_to=message)
    rounding = seeds.stream(job.seed, "client", client, "round", at, "compression")
    packed, residual = job.compression.pack(sent, now, state.residual, worker.layout.parameters, rounding)
    kept = ClientState(to_arrays(worker.model, local), mine, memo, at, residual, paid.ledger.text(), "", state.examples)
    kept.save(context)
    memory.keep(config, context, client)
    return Message(codec.reply(packed, metrics), reply_to=message)


@app.query("aggregation")
def answer(message: Message, context: Context) -> Message:
    """Answer a question of the round's aggregation, before or after training."""
    config = codec.config_of(message.content)
    content = clients.answer(parse(str(config["job"])), clients.told(config), context)
    return Message(content, reply_to=message)


@app.query()
def who(message: Message, context: Context) -> Message:
    """Say which partition this node serves, so that cohorts can be drawn by client and not by node id."""
    site.same_version(context.run_config)
    partition = site.client_of(context.node_config)
    said = MetricRecord({"partition-id": partition, KEEPS: int("state-dir" in context.node_config)})
    return Message(RecordDict({codec.METRICS: said}), reply_to=message)
