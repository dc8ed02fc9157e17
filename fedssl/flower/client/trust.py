"""What a client does not take a server's word for, before it reads or trains anything."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

from flwr.app import ConfigRecord, Context

from fedssl.errors import PrivacyError, ProtocolError
from fedssl.job import Job

FLOOR = ("max-epsilon", "max-delta", "secure-noise")  # demands of a node's own configuration
_PINNED = "first-job"


def check(job: Job, config: Mapping[str, object], context: Context) -> None:
    """Refuse a message that an honest server would not have sent.

    Raises:
        ProtocolError: it names a directory of this machine, where the client would read, write and delete files.
        PrivacyError: the node makes demands, and the job is another one than that which the run began with: each by
            itself may stay below what the node allows, and both together not.
    """
    if "state-dir" in config and not in_ray():
        raise ProtocolError(
            "the server names a directory on this device to keep state in, which only a simulation may: it runs "
            "another version, or is not to be trusted"
        )
    if not any(context.node_config.get(key) for key in FLOOR):
        return
    digest = hashlib.sha256(job.text.encode()).hexdigest()
    if _PINNED not in context.state:
        context.state[_PINNED] = ConfigRecord({"sha256": digest})
    elif context.state.config_records[_PINNED]["sha256"] != digest:
        raise PrivacyError(
            "the job has changed since this node's first round of the run, and what two jobs spend adds up: start "
            "another run for another job"
        )


def in_ray() -> bool:
    """Whether this process is one of Ray's: then it is part of Flower's simulation, whose server and clients are one
    person's. A SuperNode's never is, and no message makes it one.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
