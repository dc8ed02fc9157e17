"""A job: everything a client must know to train, as one canonical JSON text that travels with each instruction."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from fedssl import seeds
from fedssl.aggregation.admission import refuse
from fedssl.aggregation.base import Aggregation, Answering, Planned
from fedssl.build import build, coerce, construct, load
from fedssl.client import Local, check_memory
from fedssl.compression import Compression
from fedssl.decorrelated import Decorrelated
from fedssl.errors import ConfigError
from fedssl.gradient import Privacy
from fedssl.method import Augment, MultiCrop, SSLMethod
from fedssl.modalities.pairs import SIDES
from fedssl.participation.base import Attendance, Participation
from fedssl.partition import Elsewhere, FeatureShift, Partition, Parts, Splittable, sizes_of
from fedssl.parts import Part
from fedssl.sections import Consent, Evaluate, Federation
from fedssl.wrapper import Wrapper


class Source(Protocol):
    """A configured data set."""

    @property
    def augment(self) -> Augment: ...

    def load(self) -> Any: ...


@runtime_checkable
class Owner(Protocol):
    """A strategy that has a say in who owns which part, and may need summaries that only some methods make."""

    @property
    def needs(self) -> Collection[str]: ...

    def shares(self, parts: Sequence[Part]) -> Mapping[str, str]: ...


class Job:
    """A resolved configuration and the objects it describes, built when first asked for.

    Attributes:
        text: the canonical JSON; equal texts are equal jobs.
        seed, device, threads, baselines, checkpoint_every: scalars of the configuration.
        share, start: the configuration's word on who owns which part; the run whose encoder the server begins with.
    """

    SCALARS: Mapping[str, type] = {
        "seed": int,
        "device": str,
        "threads": int,
        "baselines": bool,
        "checkpoint_every": int,
    }
    OPTIONAL = ("public", "encoders", "start")  # null, or public examples, encoders of clients, a run to begin with
    GROUPS = (
        *("method", "encoder", "data", "partition", "participation", "strategy", "privacy", "compression"),
        "aggregation",
    )
    SECTIONS = ("local", "federation", "evaluate", "payload")

    def __init__(self, tree: Mapping[str, Any]) -> None:
        known = {*self.SCALARS, *self.GROUPS, *self.SECTIONS, *self.OPTIONAL}
        for key in tree:
            if key not in known:
                raise ConfigError(f"{key} is not a section of a job: the sections are {', '.join(sorted(known))}")
        for key in sorted(known - set(tree) - set(self.OPTIONAL)):
            raise ConfigError(f"the job has no {key!r}: compose it with `fedssl pretrain`, or add that section")
        self.tree = dict(tree)
        self.text = json.dumps(self.tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        scalars = {key: coerce(tree[key], kind, key) for key, kind in self.SCALARS.items()}
        self.seed: int = scalars["seed"]
        self.device: str = scalars["device"]
        self.threads: int = scalars["threads"]
        self.baselines: bool = scalars["baselines"]
        self.checkpoint_every: int = scalars["checkpoint_every"]
        self.start: str | None = coerce(tree.get("start"), str | None, "start")
        if self.seed < 0 or self.threads < 1 or self.checkpoint_every < 1:
            raise ConfigError("seed must be at least 0, threads and checkpoint_every at least 1")
        strategy = dict(tree["strategy"])
        self.share: dict[str, str] = coerce(strategy.pop("share", {}), dict[str, str], "strategy.share")
        self._strategy = strategy

    @property
    def fingerprint(self) -> str:
        """The first 8 hexadecimal digits of the SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]

    @cached_property
    def method(self) -> SSLMethod:
        """The self-supervised method, with the decorrelation that `local` asks for."""
        method = cast(SSLMethod, build(self.tree["method"], "method"))
        return Decorrelated(method, self.local.decorrelation) if self.local.decorrelation else method

    @cached_property
    def encoder(self) -> Any:
        """The encoder's description; `.make(shape)` builds the network."""
        return build(self.tree["encoder"], "encoder")

    @cached_property
    def encoders(self) -> dict[str, Any]:
        """The encoders that are dealt to the clients in turn, by name in order; empty: all have `encoder`."""
        named = self.tree.get("encoders") or {}
        if not isinstance(named, Mapping):
            raise ConfigError("encoders is no table of names: give each a name of its own, encoder@encoders.a=conv4")
        return {name: build(named[name], f"encoders.{name}") for name in sorted(named)}

    def encoder_of(self, client: int | None) -> Any:
        """The description of a client's encoder, or of the server's for None."""
        name = self.encoder_name(client)
        return self.encoders[name] if name else self.encoder

    def encoder_name(self, client: int | None) -> str:
        """Which of `encoders` a client has; empty for the server's own, which all have without that section."""
        names = list(self.encoders)
        return names[client % len(names)] if names and client is not None else ""

    @cached_property
    def data(self) -> Source:
        """The data set's description; nothing is read yet."""
        return cast(Source, build(self.tree["data"], "data"))

    @cached_property
    def partition(self) -> Partition:
        """The partitioner."""
        return cast(Partition, build(self.tree["partition"], "partition"))

    @cached_property
    def participation(self) -> Participation:
        """Who takes part when."""
        return cast(Participation, build(self.tree["participation"], "participation"))

    def attendance(self, at: int) -> Attendance:
        """The turns that end in round `at`, known from the configuration alone."""
        return self.participation.plan(self.federation.clients, at, self.seed)

    @cached_property
    def privacy(self) -> Privacy:
        """What is claimed of single examples, and so how batches become gradients."""
        return cast(Privacy, build(self.tree["privacy"], "privacy"))

    @cached_property
    def _rounds(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for at in range(1, self.federation.rounds + 1):
            for turn in self.attendance(at).turns:
                found[turn.client] = found.get(turn.client, 0.0) + turn.work
        return found

    def rounds_of(self, client: int) -> float:
        """In how many rounds a client takes part, a shortened one counting for its share; from the configuration."""
        return self._rounds.get(client, 0.0)

    @cached_property
    def compression(self) -> Compression:
        """How updates are coded."""
        return cast(Compression, build(self.tree["compression"], "compression"))

    @cached_property
    def aggregation(self) -> Aggregation:
        """How the updates of a round become what the strategy merges."""
        return cast(Aggregation, build(self.tree["aggregation"], "aggregation"))

    @property
    def private(self) -> bool:
        """Whether anything is to be hidden, so that no randomness of a round may be used twice."""
        return self.privacy.private or not self.aggregation.each

    @property
    def planned(self) -> Planned:
        """The run as far as aggregations read it."""
        return Planned(self.federation.clients, self.federation.rounds, self.seed, self.participation)

    @cached_property
    def local(self) -> Local:
        """Local training."""
        return cast(Local, construct(Local, self.tree["local"], "local"))

    @cached_property
    def federation(self) -> Federation:
        """Who there is."""
        return cast(Federation, construct(Federation, self.tree["federation"], "federation"))

    @cached_property
    def evaluate(self) -> Evaluate:
        """What is measured."""
        return cast(Evaluate, construct(Evaluate, self.tree["evaluate"], "evaluate"))

    @cached_property
    def consent(self) -> Consent:
        """What may leave a client."""
        return cast(Consent, construct(Consent, self.tree["payload"], "payload"))

    def strategy(self) -> Any:
        """A new strategy object: strategies may hold state, so each run has its own."""
        load(str(self._strategy.get("_target_", "")))  # first, because importing Flower sets up its logger
        logger = logging.getLogger("flwr")
        before = logger.level
        logger.setLevel(
            logging.ERROR
        )  # Flower's strategies warn that they do not evaluate, which is not their job here
        try:
            return build(self._strategy, "strategy")
        finally:
            logger.setLevel(before)

    @cached_property
    def ownership(self) -> dict[str, str]:
        """Who owns which part where the method has no say: the strategy's word, and before it the configuration's."""
        strategy = self.strategy()
        chosen = strategy.shares(self.method.parts) if isinstance(strategy, Owner) else {}
        return {**chosen, **self.share}

    def check(self) -> None:
        """Build every part once, so that bad options are refused before any data is read.

        Raises:
            ConfigError: for the first option that does not fit.
        """
        _ = self.method, self.encoder, self.encoders, self.data, self.partition, self.privacy, self.local
        _ = self.federation, self.participation, self.evaluate, self.consent, self.compression, self.aggregation
        _ = self.tree.get("public") is None or build(self.tree["public"], "public")
        self.strategy()
        self._check_fit()
        self.privacy.check(self.method)
        check_memory(self.local, self.privacy.private)

    def _check_fit(self) -> None:
        """Refuse combinations that make no sense, by name."""
        method, encoder, data = (self._word(group) for group in ("method", "encoder", "data"))
        modality = self.data.augment.modality
        if self.encoder.modality != modality:
            raise ConfigError(
                f"{encoder} reads {self.encoder.modality} and {data} gives {modality}: choose another encoder; "
                "`fedssl list encoders` shows what each reads"
            )
        for side in SIDES if modality == "pairs" else ():
            tower, views = getattr(self.encoder, side), getattr(self.data.augment, side)
            if tower.modality != views.modality:
                raise ConfigError(
                    f"encoder.{side} ({type(tower).__name__}) reads {tower.modality} and data.augment.{side} gives "
                    f"{views.modality}: choose another tower with encoder@encoder.{side}=NAME"
                )
        if modality not in self.method.modalities:
            raise ConfigError(
                f"{method} makes no sense on {modality}: as configured it takes {', '.join(self.method.modalities)}; "
                "choose another method or other options of it"
            )
        if isinstance(self.partition, FeatureShift) and modality not in ("images", "timeseries"):
            raise ConfigError(
                f"partition=feature_shift changes images and time series and {data} gives {modality}: choose another"
            )
        if self.method.local_views and not isinstance(self.data.augment, MultiCrop):
            raise ConfigError(f"method.local_views crops, which {data} cannot: use method.local_views=0")
        if self.method.reads_public and self.tree.get("public") is None:
            raise ConfigError(f"{method} as configured reads public examples and there are none: add data@public=NAME")
        if self.local.compiled and self.privacy.private:
            raise ConfigError("gradients of single records are not compiled: use local.compiled=false, or privacy=none")
        self._check_others(data, modality)
        self._check_summaries(method, self._word("strategy"))
        if not self.aggregation.each:
            quorum = 1 if isinstance(self.aggregation, Answering) else self.federation.quorum  # who asks, counts
            about = (quorum, self.privacy, self.aggregation.secret_cohorts)
            refuse(self.strategy(), self.method.summaries, self.compression, *about)
        self.aggregation.admit(self.planned)

    def _maker(self, summary: str) -> str:
        """The word for the method that makes a summary: the chosen one, or one that it wraps."""
        maker = self.method
        while isinstance(maker, Wrapper) and summary in maker.base.summaries:
            maker = maker.base
        return type(maker).__name__.lower()

    def _check_summaries(self, method: str, strategy: str) -> None:
        """Refuse a strategy that cannot merge what the method summarises, or that needs what it does not."""
        rule, made = self.strategy(), self.method.summaries
        needs = rule.needs if isinstance(rule, Owner) else ()
        lacking = [name for name in needs if name not in made]
        if lacking:
            raise ConfigError(
                f"the strategy {strategy} needs {lacking[0]!r}, which clients of the method {method} do not send: "
                f"use method={strategy.lower()}, or another strategy"
            )
        for part in self.method.parts:
            if part.name not in made:
                continue
            if part.name not in needs:
                raise ConfigError(
                    f"{strategy} would average {part.name!r}, in which each client of the method {method} summarises "
                    f"its data, as if it were weights: use strategy={self._maker(part.name)}"
                )
            if part.name in self.share:
                raise ConfigError(
                    f"share.{part.name}={self.share[part.name]}, but the strategy {strategy} is what sets that part: "
                    "leave it out of the shares"
                )
            if self.baselines:
                raise ConfigError(
                    f"the central baseline has no server to set {part.name!r} of {method}: use baselines=false"
                )

    def _check_others(self, data: str, modality: str) -> None:
        """Refuse encoders of clients that read something else, and public examples that are the clients' own."""
        for name, encoder in self.encoders.items():
            if encoder.modality != modality:
                raise ConfigError(
                    f"encoders.{name} reads {encoder.modality} and {data} gives {modality}: choose another encoder"
                )
        ours, theirs = ({**(self.tree.get(name) or {}), "augment": None} for name in ("data", "public"))
        if ours == theirs and (self.method.public_limit is not None or self.private):
            raise ConfigError(
                "data@public names the clients' own examples, which would be public then: choose others of their shape"
            )

    def _word(self, group: str) -> str:
        return str(self.tree[group]["_target_"]).rpartition(".")[2]


@lru_cache(maxsize=8)
def parse(text: str) -> Job:
    """The job that a client received; equal texts give the same object, so what it has built is reused."""
    return Job(json.loads(text))


def split(job: Job, train: Splittable) -> Parts:
    """The shards of all clients: sorted indices into the training set, the same on every machine.

    Raises:
        ConfigError: a client would have no examples, or the partitioner does not fit the data.
    """
    parts = job.partition.split(train, job.federation.clients, seeds.stream(job.seed, "partition"))
    if isinstance(parts, Elsewhere):
        return parts
    empty = np.flatnonzero(sizes_of(parts) == 0)
    if len(empty):
        raise ConfigError(
            f"{len(empty)} of {len(parts)} clients would have no examples (the first is client {empty[0]}): "
            "use fewer federation.clients, or another partition"
        )
    return parts
