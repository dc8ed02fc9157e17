"""The Flower ClientApp: the same in one process, in Flower's simulation and on a device.

A client needs the message, its own Context and its data, nothing else.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedssl import seeds, tree
from fedssl.aggregation.base import Sender
from fedssl.client import FitResult, fit
from fedssl.datasets.base import Data
from fedssl.edge.limits import Limits
from fedssl.flower import codec
from fedssl.flower.aggregation import clients
from fedssl.flower.client import trust
from fedssl.flower.client.account import Account, settle
from fedssl.flower.client.instruction import Instruction
from fedssl.flower.client.worker import Start, Worker, load, prepare
from fedssl.flower.codec import KEEPS, ClientState, remember_step
from fedssl.flower.deploy import growing, memory, site
from fedssl.job import Job, parse, payload
from fedssl.job.setup import device_of, public_of, untrained
from fedssl.method import Examples
from fedssl.model import to_arrays
from fedssl.parts import Arrays, Share, part_of

app = ClientApp()
_LOG = logging.getLogger("fedssl")


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training: read the job, restore, receive, pay, fit, save, reply."""
    asked = Instruction.of(message)
    job = asked.job
    trust.check(job, asked.config, context)
    client = site.client_of(context.node_config)
    limits = Limits.of(context.node_config)
    allowance = limits.allowance()
    work = 0.0 if _declined(limits, asked.at) else asked.work
    device = device_of(job)
    # Not only at start: the number of threads is a property of each thread, and Flower brings its own.
    torch.set_num_threads(job.threads)
    data, shard = site.holds(job, client, context.node_config, device)
    worker = prepare(job, client, data.train.shape, len(shard), device)
    state = _restored(asked, context, client, shard, worker)
    start = load(worker, job, _received(job, message, worker), state, asked.made + 1, client)
    worker.admit(job, shard)
    account = settle(asked, client, len(shard), state, work, allowance, context)
    began = time.monotonic()
    result = fit(
        job.method,
        worker.model,
        shard,
        job.data.augment,
        job.local,
        gradient=account.gradient,
        round=asked.begun,
        rounds=job.federation.rounds,
        seed=job.seed,
        client=client,
        public=public_of(job, device),
        pull=worker.pull,
        work=account.paid.work,
        attempt=asked.attempt,
        allowance=account.allowance,
    )
    if limits.seconds is not None and result.steps:
        remember_step(context, (time.monotonic() - began) / result.steps)
    return Message(_content(asked, client, data, worker, start, account, result, context), reply_to=message)


def _declined(limits: Limits, at: int) -> bool:
    """Whether the device sits this round out, which its own log is told."""
    why = limits.declined()
    if why:
        _LOG.warning("this node takes no step in round %d: %s", at, why)
    return bool(why)


def _restored(asked: Instruction, context: Context, client: int, shard: Examples, worker: Worker) -> ClientState:
    """What the client has kept, with rows of banks where its examples are now."""
    memory.restore(asked.config, context, client, asked.at)
    state = ClientState.load(context)
    if "data-dir" not in context.node_config:
        return state
    sized = [part.name for part in asked.job.method.parts if part.sized]
    return growing.follow(state, shard, sized, worker.initial)


def _received(job: Job, message: Message, worker: Worker) -> Arrays:
    """The arrays of an instruction in full."""
    told = {key: value for key, value in worker.initial.items() if worker.shares[key].comes}
    wire = codec.decode(codec.arrays_of(message.content))
    return job.compression.unpack_down(wire, told, worker.layout.parameters)


def _content(
    asked: Instruction,
    client: int,
    data: Data,
    worker: Worker,
    start: Start,
    account: Account,
    result: FitResult,
    context: Context,
) -> RecordDict:
    """What the reply says. What the client keeps is saved before."""
    job, now = asked.job, start.received
    sender = Sender(client, asked.at, asked.attempt, result.examples, job.seed)
    merged = {key: value for key, value in now.items() if worker.shares.get(key) is Share.merge}
    metrics = _scalars(client, account, result)
    if not result.steps:  # no time for a single one: nothing has changed, and there is nothing to send
        if job.aggregation.each:
            return codec.reply({}, metrics)
        return clients.reply(job, asked.config, sender, {}, merged, context, account.paid.public)  # nobody's business
    trained = to_arrays(worker.model, [key for key in now if worker.shares.get(key) is not Share.received])
    memo, mine = start.memo, {}
    if worker.rule is not None:
        memo = worker.rule.remember(start.merged, trained, memo, worker.layout)
        mine = {key: value for key, value in trained.items() if part_of(key) in worker.rule.keeps}
    metrics = _measured(job, account, result, trained, now, metrics)
    lacking = untrained(data, client, trained)
    sent = {key: value for key, value in trained.items() if key not in lacking}
    residual: Arrays = {}
    known = payload.uploads(job, data.train.shape)
    payload.check_reply(known, sent, metrics, [*result.measures, *result.movement])
    if job.aggregation.each:
        rounding = seeds.stream(job.seed, "client", client, "round", asked.at, "compression")
        parameters = worker.layout.parameters
        sent, residual = job.compression.pack(sent, now, start.state.residual, parameters, rounding)
    local, ledger = to_arrays(worker.model, start.local), account.paid.ledger.text()
    ClientState(local, mine, memo, asked.at, residual, ledger, account.own, start.state.examples).save(context)
    memory.keep(asked.config, context, client)
    if job.aggregation.each:
        return codec.reply(sent, metrics)
    return clients.reply(job, asked.config, sender, sent, merged, context, account.paid.public)


def _scalars(client: int, account: Account, result: FitResult) -> dict[str, float | int]:
    """What every ordinary reply says beside its arrays."""
    return {
        codec.WEIGHT: result.examples if account.gradient.weight is None else account.gradient.weight,
        "partition-id": client,
        "steps": result.steps,
        "work": result.work,
        **account.paid.public,
    }


def _measured(
    job: Job, account: Account, result: FitResult, trained: Arrays, now: Arrays, metrics: Mapping[str, float | int]
) -> dict[str, float | int]:
    """The scalars of a reply: these, and what training gives; of a private client functions of its weights only."""
    weights = {key: value for key, value in trained.items() if part_of(key) not in job.method.summaries}
    drift = math.sqrt(tree.squared_distance(weights, now))
    found = {**result.movement, **metrics, "drift": drift}  # as private as the weights are
    if account.gradient.private:
        return found
    return {**result.measures, **found, "loss": result.loss, "feature_std": result.feature_std}


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
