"""The client's side: what replaces the trained arrays and the metrics in a reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from fedssl.aggregation.base import Answering, Scalar, Sender, Told
from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.job import Job
from fedssl.parts import Arrays

_PREFIX = "aggregation."  # of what the session told, in the configuration of an instruction
STATE = "aggregation"  # in a Context: what a client remembers of a conversation


def told(config: Mapping[str, object]) -> dict[str, Scalar]:
    """What the server's session told this client."""
    return {k.removeprefix(_PREFIX): v for k, v in config.items() if k.startswith(_PREFIX)}  # type: ignore[misc]


def lost(config: Mapping[str, object]) -> list[tuple[int, int]]:
    """The attempts of rounds that have begun and are lost, by round and attempt."""
    rounds, attempts = (cast(list[int], config.get(f"lost-{name}", [])) for name in ("rounds", "attempts"))
    return list(zip(rounds, attempts, strict=True))


def untold(words: Told) -> dict[str, Scalar]:
    """The same as entries of a configuration."""
    return {f"{_PREFIX}{key}": value for key, value in words.items()}


def reply(
    job: Job,
    config: Mapping[str, object],
    sender: Sender,
    trained: Arrays,
    received: Arrays,
    context: Context,
    public: Mapping[str, float],
) -> RecordDict:
    """The content of a reply: the update as the aggregation lets it go, and hardly a number beside it.

    Args:
        job: what is run.
        config: of the instruction.
        sender: this client.
        trained: the arrays that it has trained; those that it lacks count as unchanged.
        received: the values of all arrays that are asked for, as they came.
        context: of this client.
        public: numbers that say nothing of its data: what decides the epsilon of its records.
    """
    change = {
        key: np.asarray(trained.get(key, value).astype(np.float64) - value.astype(np.float64))  # 0-d would be scalars
        for key, value in received.items()
    }
    words = told(config)
    if STATE in context.state:
        words |= {f"own.{k}": v for k, v in context.state.config_records[STATE].items()}  # type: ignore[misc]
    content = codec.reply(job.aggregation.send(change, words, sender), {**public, "partition-id": sender.client})
    if isinstance(job.aggregation, Answering):
        context.state[STATE] = ConfigRecord(dict(job.aggregation.sent(words, sender)))
    return content


def answer(job: Job, question: Told, context: Context) -> RecordDict:
    """The content of a reply to a question of the server's session.

    Raises:
        ProtocolError: the job's aggregation asks nothing.
    """
    if not isinstance(job.aggregation, Answering):
        raise ProtocolError("the server asked what this aggregation does not answer: it runs another version")
    client = int(context.node_config["partition-id"])
    secrets = dict(context.state.config_records[STATE]) if STATE in context.state else {}
    said, secrets = job.aggregation.answer(question, secrets, client)  # type: ignore[arg-type,assignment]
    context.state[STATE] = ConfigRecord(secrets)
    return RecordDict({codec.CONFIG: ConfigRecord(dict(said))})
