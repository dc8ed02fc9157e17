"""Runs in which some clients lie: a wrapper of the ClientApp in this process, and of nothing that is deployed."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedssl import seeds, tree
from fedssl.aggregation.bounded import Bounded
from fedssl.aggregation.plain import Plain
from fedssl.cohort.choice import Choice
from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.flower import codec
from fedssl.flower.client_app import app
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.server import federate
from fedssl.job import parse
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory
from simulations.attacks.poison import Attack, Turn

TRAIN = "train"  # the type of a message that asks for an update


@dataclass(frozen=True)
class Liars:
    """A ClientApp: that of honest clients, whose replies the chosen clients replace."""

    attack: Attack
    clients: Collection[int]

    def __call__(self, message: Any, context: Any) -> Any:
        """As Flower calls a ClientApp: a message and the Context of a node, to the reply."""
        reply = app(message, context)
        client = int(context.node_config["partition-id"])
        if client not in self.clients or not reply.has_content() or message.metadata.message_type != TRAIN:
            return reply
        config = codec.config_of(message.content)
        job, at = parse(str(config["job"])), int(config["server-round"])
        start = codec.decode(codec.arrays_of(message.content))
        sent = codec.decode(codec.arrays_of(reply.content))
        floats = [key for key, value in sent.items() if start[key].dtype.kind == "f"]
        honest = {key: sent[key] - start[key] if job.aggregation.each else sent[key] for key in floats}
        rng = seeds.stream(job.seed, "attack", client, "round", at)
        lie = self.attack.poison(honest, Turn(job, client, at, start, rng))
        values = {key: start[key] + lie[key] if job.aggregation.each else lie[key] for key in floats}
        reply.content[codec.ARRAYS] = codec.encode(sent | tree.like(values, sent))
        return reply


def run(plan: Plan, attack: Attack | None, clients: Collection[int], path: Path) -> RunDirectory:
    """The finished run of a plan in which these clients lie, or read if it has finished before.

    Args:
        plan: of the run; in one process, plain updates or their means.
        attack: None for a run of honest clients.
        clients: who lies.
        path: of the run directory, which the attack has its part in: a job's own name does not know of it.

    Raises:
        ConfigError: updates are compressed or hidden, so that this wrapper cannot read them.
    """
    job = plan.job
    if not job.compression.lossless or not isinstance(job.aggregation, Plain | Bounded):
        raise ConfigError(
            "liars need compression=none and aggregation=plain, mean or bounded: others hide what they change"
        )
    rundir = plan.at(path).open()
    if rundir.done:
        return rundir
    torch.set_num_threads(job.threads)
    client_app: Any = app if attack is None else Liars(attack, frozenset(clients))
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)  # its strategies log every round
    try:
        count = job.federation.clients
        together = Choice(count, count)  # trains them as one batch of models: their liars differ in what they send only
        with InProcessGrid(client_app, count, choice=together) as grid:
            federate(grid, job, rundir, Reporter(quiet=True))
    finally:
        logger.setLevel(before)
    return rundir
