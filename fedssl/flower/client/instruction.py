"""What an instruction asks of a client."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, Message

from fedssl.flower import codec
from fedssl.job import Job, parse


@dataclass(frozen=True)
class Instruction:
    """The configuration of a training message, read.

    Attributes:
        config: all that it says.
        job: what is run.
        at: the round that the turn ends in.
        begun: the round that it began in.
        made: the round that made the model that it begins with.
        work: the share of a round's steps that is asked for.
        attempt: how often round `at` has been begun, from 1.
    """

    config: ConfigRecord
    job: Job
    at: int
    begun: int
    made: int
    work: float
    attempt: int

    @classmethod
    def of(cls, message: Message) -> Instruction:
        """Read a message's configuration; what it does not say is as for a whole turn from the present model."""
        config = codec.config_of(message.content)
        at = int(config["server-round"])  # type: ignore[arg-type]  # a ConfigRecord is loose
        begun = int(config.get("begun", at))  # type: ignore[arg-type]
        made, work = int(config.get("made", begun - 1)), float(config.get("work", 1.0))  # type: ignore[arg-type]
        attempt = int(config.get("attempt", 1))  # type: ignore[arg-type]
        return cls(config, parse(str(config["job"])), at, begun, made, work, attempt)
