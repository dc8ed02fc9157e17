"""What a run is refused for before its first round, once the shapes of all arrays are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedssl.datasets.base import Partial
from fedssl.errors import ConfigError, PrivacyError
from fedssl.flower.rule import PartRule
from fedssl.job import Job
from fedssl.job.setup import build_model, shares_of, untrained
from fedssl.model import to_arrays
from fedssl.partition import Virtual
from fedssl.parts import Arrays, Owner, Share, part_of
from fedssl.sites import Sites


def holders(job: Job) -> None:
    """Refuse a claim for single examples where several clients hold the same ones.

    Raises:
        PrivacyError: they do.
    """
    if isinstance(job.partition, Virtual) and job.privacy.private:
        raise PrivacyError(
            "partition=virtual gives one example to several clients, and each would count its epsilon as if it were "
            "the only one: use a partition of disjoint parts, or aggregation=client_dp for the unit client"
        )


def sites(job: Job, data: Any) -> None:
    """Refuse to measure where clients' data is nowhere but on their nodes.

    Raises:
        ConfigError: a baseline would need their examples, or the server has none of its own to measure with.
    """
    if not isinstance(job.partition, Sites):
        return
    if job.baselines:
        raise ConfigError("baselines=true trains on the union of the clients' data, which nobody has: use false")
    if job.evaluate.every and not len(data.test):
        raise ConfigError(
            f"evaluate.every={job.evaluate.every} measures on the server, which has no data set: use evaluate.every=0, "
            "or give it one of its own with data.path or data.root"
        )
    job.partition.check(data, "the server's")


def senders(job: Job, data: Any, strategy: Any, shares: Mapping[str, Share]) -> None:
    """Refuse a strategy that merges whole models only, if some client will send a part of one.

    Raises:
        ConfigError: for the first such client.
    """
    if not (job.aggregation.each and isinstance(data.train, Partial)) or (
        isinstance(strategy, PartRule) and strategy.reads == "mean"
    ):
        return  # what a client lacks is no change, where changes are averaged before the strategy
    merged = [key for key, share in shares.items() if share is Share.merge]
    short = [c for c in range(job.federation.clients) if untrained(data, c, merged)]
    if short:
        raise ConfigError(
            f"client {short[0]} lacks a modality and sends no arrays of its tower, but {type(strategy).__name__} "
            "merges whole models only: use strategy=fedavg, or give every client both (data.holds=[both])"
        )


def received(strategy: Any, shares: Mapping[str, Share]) -> None:
    """Refuse parts that clients do not send back to a strategy that merges whole models only.

    Raises:
        ConfigError: for the first such part.
    """
    if isinstance(strategy, PartRule) and (
        strategy.reads == "mean" or (isinstance(strategy, Owner) and strategy.needs)
    ):
        return  # one that needs summaries knows which parts are its own
    unsent = [key for key, share in shares.items() if share is Share.received]
    if unsent:
        raise ConfigError(
            f"part {part_of(unsent[0])!r} is received and never sent back, but {type(strategy).__name__} merges whole "
            "models only: use strategy=fedavg"
        )


def architectures(job: Job, shape: tuple[Any, ...], initial: Arrays, shares: Mapping[str, Share]) -> None:
    """Refuse encoders of clients that make arrays which travel differ from the server's.

    Args:
        job: gives the encoders.
        shape: of one example.
        initial: all arrays of the server's model.
        shares: who owns each of them.

    Raises:
        ConfigError: for the first array that is another one.
    """
    ours = {key: value.shape for key, value in initial.items() if shares[key].comes}
    for client, name in enumerate(job.encoders):
        model = build_model(job, shape, client=client)
        travel = [key for key, share in shares_of(job, model).items() if share.comes]
        theirs = {key: value.shape for key, value in to_arrays(model, travel).items()}
        odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if odd:
            part, strategy = part_of(odd[0]), str(job.tree["strategy"]["_target_"]).rpartition(".")[2]
            raise ConfigError(
                f"part {part!r} has other arrays with encoders.{name} than with encoder, and {strategy} sends it from "
                f"one to the other: use method=flesd strategy=flesd, or strategy.share.{part}=local"
            )


def start(job: Job, shares: Mapping[str, Share]) -> None:
    """Refuse a run to begin with whose encoder would not reach the clients whole, teachers that follow it included.

    Raises:
        ConfigError: for the first array that stays with the clients, who would begin with seeded values.
    """
    own = {"encoder", *(part.name for part in job.method.parts if "encoder" in part.follows)}
    kept = [key for key, share in shares.items() if share is Share.local and part_of(key) in own]
    if job.start is not None and kept:
        raise ConfigError(
            f"start={job.start} is read by the server only and {kept[0]} stays with the clients, who would begin "
            "without it: let it merge, or use start=null"
        )
