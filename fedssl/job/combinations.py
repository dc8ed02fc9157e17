"""Combinations of options that make no sense, refused by name before any data is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedssl.aggregation.admission import refuse
from fedssl.aggregation.base import Answering
from fedssl.errors import ConfigError
from fedssl.method import MultiCrop
from fedssl.methods.common.wrapper import Wrapper
from fedssl.modalities.pairs import SIDES
from fedssl.partition import FeatureShift
from fedssl.parts import Owner

if TYPE_CHECKING:
    from fedssl.client import Local
    from fedssl.job.job import Job


def refuse_combinations(job: Job) -> None:
    """Refuse what makes no sense together, by name.

    Raises:
        ConfigError: for the first such combination.
    """
    method, encoder, data = (_word(job, group) for group in ("method", "encoder", "data"))
    modality = job.data.augment.modality
    if job.encoder.modality != modality:
        raise ConfigError(
            f"{encoder} reads {job.encoder.modality} and {data} gives {modality}: choose another encoder; "
            "`fedssl list encoders` shows what each reads"
        )
    for side in SIDES if modality == "pairs" else ():
        tower, views = getattr(job.encoder, side), getattr(job.data.augment, side)
        if tower.modality != views.modality:
            raise ConfigError(
                f"encoder.{side} ({type(tower).__name__}) reads {tower.modality} and data.augment.{side} gives "
                f"{views.modality}: choose another tower with encoder@encoder.{side}=NAME"
            )
    if modality not in job.method.modalities:
        raise ConfigError(
            f"{method} makes no sense on {modality}: as configured it takes {', '.join(job.method.modalities)}; "
            "choose another method or other options of it"
        )
    if isinstance(job.partition, FeatureShift) and modality not in ("images", "timeseries"):
        raise ConfigError(
            f"partition=feature_shift changes images and time series and {data} gives {modality}: choose another"
        )
    if job.method.local_views and not isinstance(job.data.augment, MultiCrop):
        raise ConfigError(f"method.local_views crops, which {data} cannot: use method.local_views=0")
    if job.method.reads_public and job.tree.get("public") is None:
        raise ConfigError(f"{method} as configured reads public examples and there are none: add data@public=NAME")
    if job.local.compiled and job.local.checkpointing:
        raise ConfigError(
            "local.compiled=true makes one graph of the encoder and local.checkpointing=true runs its blocks again: "
            "use one of them"
        )
    if job.privacy.private:
        _single_records(job.local)
    _others(job, data, modality)
    _summaries(job, method, _word(job, "strategy"))
    if not job.aggregation.each:
        quorum = 1 if isinstance(job.aggregation, Answering) else job.federation.quorum  # who asks, counts
        about = (quorum, job.privacy, job.aggregation.secret_cohorts)
        refuse(job.strategy(), job.method.summaries, job.compression, *about)
    job.aggregation.admit(job.planned)


def _single_records(local: Local) -> None:
    """Refuse ways to take a step that gradients of single records cannot be read from."""
    if local.compiled:
        raise ConfigError("gradients of single records are not compiled: use local.compiled=false, or privacy=none")
    if local.checkpointing:
        raise ConfigError(
            "local.checkpointing=true runs layers again, and record-level privacy notes what each record does in one "
            "pass: use local.checkpointing=false and a smaller privacy.micro_batch, which bounds the memory as well"
        )


def _maker(job: Job, summary: str) -> str:
    """The word for the method that makes a summary: the chosen one, or one that it wraps."""
    maker = job.method
    while isinstance(maker, Wrapper) and summary in maker.base.summaries:
        maker = maker.base
    return type(maker).__name__.lower()


def _summaries(job: Job, method: str, strategy: str) -> None:
    """Refuse a strategy that cannot merge what the method summarises, or that needs what it does not."""
    rule, made = job.strategy(), job.method.summaries
    needs = rule.needs if isinstance(rule, Owner) else ()
    lacking = [name for name in needs if name not in made]
    if lacking:
        raise ConfigError(
            f"the strategy {strategy} needs {lacking[0]!r}, which clients of the method {method} do not send: "
            f"use method={strategy.lower()}, or another strategy"
        )
    for part in job.method.parts:
        if part.name not in made:
            continue
        if part.name not in needs:
            raise ConfigError(
                f"{strategy} would average {part.name!r}, in which each client of the method {method} summarises "
                f"its data, as if it were weights: use strategy={_maker(job, part.name)}"
            )
        if part.name in job.share:
            raise ConfigError(
                f"share.{part.name}={job.share[part.name]}, but the strategy {strategy} is what sets that part: "
                "leave it out of the shares"
            )
        if job.baselines:
            raise ConfigError(
                f"the central baseline has no server to set {part.name!r} of {method}: use baselines=false"
            )


def _others(job: Job, data: str, modality: str) -> None:
    """Refuse encoders of clients that read something else, and public examples that are the clients' own."""
    for name, encoder in job.encoders.items():
        if encoder.modality != modality:
            raise ConfigError(
                f"encoders.{name} reads {encoder.modality} and {data} gives {modality}: choose another encoder"
            )
    ours, theirs = ({**(job.tree.get(name) or {}), "augment": None} for name in ("data", "public"))
    if ours == theirs and (job.method.public_limit is not None or job.private):
        raise ConfigError(
            "data@public names the clients' own examples, which would be public then: choose others of their shape"
        )


def _word(job: Job, group: str) -> str:
    return str(job.tree[group]["_target_"]).rpartition(".")[2]
