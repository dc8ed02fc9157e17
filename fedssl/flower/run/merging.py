"""From a cohort to a merged model: what it is told, what comes back, what the strategy makes of that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

from flwr.app import ConfigRecord, Message

from fedssl import tree
from fedssl.errors import ConfigError
from fedssl.evaluation.monitor import Watch
from fedssl.flower import codec, turns
from fedssl.flower.deploy import reminders
from fedssl.flower.exchange import CohortGrid, exchange, instruct
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rule import PartRule
from fedssl.flower.run.cohort import Cohort
from fedssl.flower.run.running import Running
from fedssl.flower.run.tally import Tally
from fedssl.job.setup import untrained
from fedssl.parts import Arrays, Share


def expect(run: Running, cohort: Cohort, now: Arrays, watch: Watch | None) -> Tally:
    """What is to come back, and who is shown it before it is freed."""

    def keep(client: int, arrays: Arrays) -> None:
        if watch is not None:
            watch.keep(client, arrays, _local_arrays(run, client) if client in watch.watched else {})

    def moved(client: int, arrays: Arrays) -> None:
        if watch is not None:
            watch.weights.add(client, arrays)  # the merge is compared with what was merged

    return Tally(
        expected=list(cohort.turns),
        tolerate=run.job.federation.tolerate,
        now=now,
        partition_of={run.nodes[client]: client for client in cohort.turns},
        keep=keep,
        moved=moved,
        lacking=partial(_unsent, run, now=now),
        unpack=partial(run.job.compression.unpack, parameters=run.parameters),
        began={turn.client: run.history.models[turn.start] for turn in cohort.turns.values()},
        each=run.aggregation.each,
        max_change=run.job.federation.max_change,
    )


def merge(run: Running, strategy: Any, cohort: Cohort, now: Arrays, tally: Tally) -> Arrays | None:
    """Instruct the clients and let the strategy merge what comes back; None if too little does."""
    at, asked = cohort.at, cohort.asked
    if not asked and run.aggregation.each:
        return None
    attempt = run.rundir.attempt(at) if run.job.private else 1
    messages = _instructions(run, strategy, cohort, now, attempt)
    if not run.aggregation.open({key: now[key] for key in now if key in run.merged}, at, attempt, asked):
        tally.lose({client: why for client, why in sorted(run.aggregation.silent.items()) if client in asked})
        return None
    replies = _replies(run, strategy, cohort, tally, messages)
    needed = run.job.federation.needed(len(asked)) if run.aggregation.each else 1
    first = list(islice(replies, needed))  # before the strategy, whose state merging may change
    if len(first) < needed:
        return None
    record, _ = strategy.aggregate_train(at, chain(first, replies))
    if record is None:
        raise ConfigError(
            f"the strategy merged nothing in round {at}: it needs more clients than the {len(asked)} asked; "
            "let more take part, or set federation.quorum to what it needs"
        )
    merged = tree.like(codec.decode(record), now)
    tree.check_same(merged, now, "the strategy's merge")
    return merged


def _instructions(run: Running, strategy: Any, cohort: Cohort, now: Arrays, attempt: int) -> list[Message]:
    """The strategy's messages in order of the clients, each with what is special about its client's turn."""
    at = cohort.at
    config = ConfigRecord({"job": run.job.text, "server-round": at, "made": run.history.made(at - 1)})
    if run.job.private:
        lost = run.rundir.lost()
        config.update({"attempt": attempt, "lost-rounds": [r for r, _ in lost], "lost-attempts": [a for _, a in lost]})
    config.update(reminders.told(run, at))
    by_node = {run.nodes[client]: turn for client, turn in cohort.asked.items()}
    order = {node: i for i, node in enumerate(by_node)}
    messages = list(strategy.configure_train(at, codec.encode(now), config, CohortGrid(run.grid, list(order))))
    messages.sort(key=lambda message: order[message.metadata.dst_node_id])
    for message in messages:
        turn = by_node[message.metadata.dst_node_id]
        turns.instruct(message, turn, at, run.history)
        reminders.remind(run, message, turn.client)
    return messages


def _replies(run: Running, strategy: Any, cohort: Cohort, tally: Tally, messages: list[Message]) -> Iterator[Message]:
    """Send the instructions; the good replies, as the strategy is to see them."""
    job = run.job
    run.aggregation.instruct(messages, tally.partition_of)
    tally.bytes_down = instruct(messages, partial(job.compression.pack_down, parameters=run.parameters))
    replies = tally.watch(exchange(run.grid, messages, job.federation.timeout_s))
    by_node = {run.nodes[client]: turn for client, turn in cohort.asked.items()}
    about = (by_node, cohort.at, run.history, job.participation.scale, job.method.summaries, tally.moved)
    replies = turns.catch_up(replies, *about)
    if not run.aggregation.each:
        return run.aggregation.one(replies, tally.partition_of, tally.refuse)
    if isinstance(strategy, PartRule):
        return replies
    # Flower's strategies add up in the order given; by partition it is the same on every engine.
    order = {node: i for i, node in enumerate(by_node)}
    return iter(sorted(replies, key=lambda message: order[message.metadata.src_node_id]))


def _unsent(run: Running, client: int, now: Arrays) -> frozenset[str]:
    """Those of the present arrays that a client does not send back."""
    received = {key for key in now if run.shares[key] is Share.received}
    return untrained(run.data, client, now) | received


def _local_arrays(run: Running, client: int) -> Arrays:
    """A client's own arrays of a shared process, so that a personal encoder is measured whole."""
    if not isinstance(run.grid, InProcessGrid):
        return {}
    return run.grid.states.state(run.nodes[client]).local
