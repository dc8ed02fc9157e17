"""A job: everything a client must know to train, as one canonical JSON text that travels with each instruction."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np

from fedssl import seeds
from fedssl.aggregation.base import Aggregation, Planned
from fedssl.build import build, coerce, construct, load
from fedssl.client import Local
from fedssl.compression import Compression
from fedssl.datasets.base import DataSource
from fedssl.errors import ConfigError
from fedssl.gradient import Privacy
from fedssl.job.combinations import refuse_combinations
from fedssl.job.sections import Consent, Evaluate, Federation
from fedssl.method import SSLMethod
from fedssl.methods.common.decorrelated import Decorrelated
from fedssl.participation.base import Attendance, Participation
from fedssl.partition import Elsewhere, Partition, Parts, Splittable, sizes_of
from fedssl.parts import Owner


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
    def data(self) -> DataSource:
        """The data set's description; nothing is read yet."""
        return cast(DataSource, build(self.tree["data"], "data"))

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
        refuse_combinations(self)
        self.privacy.check(self.method)


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
