"""What each client of a job holds and how it sees it; the same for training, for probes and for the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl import seeds
from fedssl.datasets.base import Data, Shard, Table
from fedssl.datasets.shifted.optics import Optics, unit_of
from fedssl.datasets.shifted.seen import Seen
from fedssl.duplicates import DuplicateSafe, leaks
from fedssl.errors import ProtocolError
from fedssl.job.job import Job, parse, split
from fedssl.job.setup import data_of
from fedssl.method import Examples
from fedssl.partition import Drawn, FeatureShift, Parts, feature_skew, owner_of

_DESCRIBED = 5000  # examples that the measure of feature skew reads, at most


def parts_of(job: Job, device: torch.device) -> Parts:
    """The clients' rows of the training set; the data set is read and split once in a process."""
    return _parts(job.text, device)


def shard_of(job: Job, client: int, device: torch.device) -> Examples:
    """What a client trains on, as it sees it.

    Raises:
        ProtocolError: the job has no such client.
    """
    parts = parts_of(job, device)
    if not 0 <= client < len(parts):
        raise ProtocolError(
            f"this node has partition-id {client}, the job has {len(parts)} clients: set federation.clients to match"
        )
    train: Table = as_seen(job, client, device, "train")
    return train.shard(parts[client], client)


def as_seen(job: Job, client: int, device: torch.device, part: str = "test") -> Any:
    """The whole test set, or the training set, as one client sees it: what a probe of that client reads.

    Without feature skew every client sees the examples as they are.
    """
    table = getattr(data_of(job, device), part)
    optics = _optics(job.text, device, part)
    return table if optics is None else Seen.by(table, client, optics)


def as_held(job: Job, device: torch.device) -> Table:
    """The training set, each example as the client that holds it sees it."""
    train: Table = data_of(job, device).train
    optics = _optics(job.text, device, "train")
    return train if optics is None else Seen.by_owners(train, owner_of(parts_of(job, device)), optics)


def as_dealt(job: Job, device: torch.device, eyes: NDArray[np.int64]) -> Table:
    """The test set, each example as the client `eyes[i]` would see it if it held it."""
    test: Table = data_of(job, device).test
    optics = _optics(job.text, device, "test")
    return test if optics is None else Seen.by_owners(test, eyes, optics)


def union_of(job: Job, device: torch.device) -> Shard:
    """All of `as_held`: what a baseline without a federation trains on."""
    train = as_held(job, device)
    return Shard.of(train, np.arange(len(train)))


def described(job: Job, data: Data, parts: Parts) -> dict[str, Any]:
    """What a special partition says of itself in split.json: the clients' appearances, near-duplicates that leak."""
    out: dict[str, Any] = {}
    partition = job.partition
    if isinstance(partition, FeatureShift):
        out["appearances"] = [asdict(one) for one in partition.appearances(len(parts), job.seed)]
        partition = partition.base
    if isinstance(partition, DuplicateSafe):
        out["near_duplicates"] = leaks(data, parts, threshold=partition.threshold)
    return out


def measured_skew(job: Job, device: torch.device) -> Mapping[str, float]:
    """`feature_skew` of a sample of what the clients see, by its name; empty where it is not defined."""
    parts, table = parts_of(job, device), as_held(job, device)
    if (
        isinstance(parts, Drawn)
        or len(table.shape) not in (2, 3)
        or not all(isinstance(side, int) for side in table.shape)
    ):
        return {}
    some = seeds.stream(job.seed, "describe").permutation(len(table))[:_DESCRIBED]
    rows = torch.split(torch.from_numpy(some).to(table.device), 512)
    batches = [table.batch(index) for index in rows]
    if not all(isinstance(batch, Tensor) for batch in batches):  # examples that views are drawn from, not yet images
        return {}
    numbers = torch.cat([statistics(batch) for batch in batches]).cpu().numpy()
    owner = owner_of(parts)
    skew = feature_skew([numbers[owner[some] == client] for client in np.unique(owner[some])])
    return {} if skew is None else {"feature_skew": skew}


def statistics(x: Tensor) -> Tensor:
    """(B, F) of images or series: each channel's mean, deviation, and mean step along every axis."""
    axes = tuple(range(2, x.dim()))
    steps = [torch.nan_to_num(x.diff(dim=axis).abs().mean(axes)) for axis in axes]  # a side of one has no step
    return torch.cat((x.mean(axes), x.std(axes, correction=0), *steps), 1)


@lru_cache(maxsize=4)
def _parts(text: str, device: torch.device) -> Parts:
    job = parse(text)
    return split(job, data_of(job, device).train)


@lru_cache(maxsize=4)
def _optics(text: str, device: torch.device, part: str) -> Optics | None:
    """How the clients see a part of the data; None where they see it as it is."""
    job = parse(text)
    if not isinstance(job.partition, FeatureShift):
        return None
    train = data_of(job, device).train
    appearances = job.partition.appearances(job.federation.clients, job.seed)
    return Optics.of(appearances, train.shape, unit_of(train), seeds.key(job.seed, "noise", part))
