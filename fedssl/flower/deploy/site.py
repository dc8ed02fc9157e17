"""What a node says of itself in its `--node-config`: which client it is, where its own data and its state are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from fedssl.datasets.base import Data
from fedssl.errors import ConfigError, FedsslError, ProtocolError
from fedssl.job import Job
from fedssl.job.setup import data_of, held
from fedssl.job.shards import shard_of
from fedssl.method import Examples
from fedssl.sites import Sites, everything

Scalars = Mapping[str, Any]  # a node_config


def same_version(run: Scalars) -> None:
    """Refuse to take part with another version of fedssl than a run was submitted with.

    Raises:
        ProtocolError: this one is another.
    """
    wanted, here = str(run.get("fedssl") or ""), version("fedssl")
    if wanted not in ("", here):
        raise ProtocolError(f"the run was submitted with fedssl {wanted} and this machine has {here}: install the same")


def client_of(node: Scalars) -> int:
    """Which client the node is.

    Raises:
        ConfigError: it does not say so.
    """
    number = node.get("partition-id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(
            f"this node says partition-id={number!r}: start it with --node-config 'partition-id=0 ...', a number of "
            "its own from 0 on"
        )
    return number


def holds(job: Job, client: int, node: Scalars, device: torch.device) -> tuple[Data, Examples]:
    """The data set that a client reads, and the part of it that is its own.

    Raises:
        ConfigError: the node's data-dir cannot be read, or holds something else than the job is for.
        ProtocolError: the job is for nodes with data of their own and this one has none, or the other way round, or
            there is no such client.
    """
    modality = job.data.augment.modality
    if node.get("modality", modality) != modality:
        raise ProtocolError(
            f"this node has {node['modality']} and the run is for {modality}: leave it out, or run with its modality"
        )
    place = node.get("data-dir")
    if place is not None:
        try:
            data = held(job, str(place), device)
        except FedsslError as error:  # the server learns what is wrong, and not where
            raise ProtocolError(f"client {client}: {str(error).replace(str(place), 'its data-dir')}") from error
        if client >= job.federation.clients:
            raise ProtocolError(
                f"this node has partition-id {client}, the job has {job.federation.clients} clients: "
                "set federation.clients to match"
            )
        return data, everything(data, client)
    if isinstance(job.partition, Sites):
        raise ProtocolError(
            "this node has no data of its own and the run is for such nodes: start it with --node-config "
            "'partition-id=0 data-dir=\"/path/to/its/data\"'"
        )
    return data_of(job, device), shard_of(job, client, device)
