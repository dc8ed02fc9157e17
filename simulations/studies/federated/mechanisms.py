"""Mechanisms of privacy as options of `fedssl pretrain`, each with the method that it is for, and their audits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedssl import config
from fedssl.aggregation.base import Occasion
from fedssl.aggregation.sampling import sampling_of
from fedssl.job import Job
from fedssl.privacy.audit.mechanism import Mechanism as Audited
from fedssl.privacy.audit.mechanism import one_run, through
from fedssl.privacy.clients.client_dp import ClientDP
from fedssl.privacy.example_dp import ExampleDP

_IMAGES = ("size=8", "channels=1", "augment.mean=[0.5]", "augment.std=[0.25]", "augment.saturation=0",
           "augment.grey=0", "augment.hue=0")  # fmt: skip
_RECORD = ("privacy.epsilon=EPSILON", "privacy.micro_batch=128")
_LENGTH = 1e3  # of a canary: far above every clip norm
_CANARIES = 1000


def public(key: str) -> tuple[str, ...]:
    """The public images, drawn shapes of the digits' size, as `data` or as `public`."""
    name = {"data": "data=synthetic", "public": "data@public=synthetic"}[key]
    return (name, *(f"{key}.{option}" for option in _IMAGES))


@dataclass(frozen=True)
class Mechanism:
    """A method, and what is added to its options for privacy.

    Attributes:
        options: of the method, with and without privacy.
        plain: added without privacy.
        private: added with it; EPSILON stands for the number.
        unit: record or client.
    """

    options: tuple[str, ...]
    plain: tuple[str, ...]
    private: tuple[str, ...]
    unit: str = "record"

    def with_epsilon(self, epsilon: float | None) -> tuple[str, ...]:
        """All options, for an epsilon, or for None without privacy."""
        added = self.plain if epsilon is None else tuple(t.replace("EPSILON", f"{epsilon:g}") for t in self.private)
        return (*self.options, "method.norm=layer", *added)


MECHANISMS: Mapping[str, Mechanism] = {
    "BYOL, records": Mechanism(("method=byol",), (), ("privacy=example", *_RECORD)),
    "VICReg, statistics": Mechanism(("method=vicreg",), (), ("privacy=statistics", *_RECORD)),
    "SimCLR, public negatives": Mechanism(
        ("method=simclr", "method.negatives=public", "method.public_batch=32", *public("public")),
        (),
        ("privacy=example", *_RECORD),
    ),
    "SimCLR, clients": Mechanism(
        ("method=simclr",),
        ("aggregation=mean",),
        ("aggregation=client_dp", "aggregation.noise_multiplier=null", "aggregation.target_epsilon=EPSILON",
         "aggregation.delta=1e-3", "aggregation.clip=0.5"),
        "client",
    ),
}  # fmt: skip


def lower_bound(options: tuple[str, ...], seed: int, canaries: int = _CANARIES) -> float | None:
    """At least so much epsilon, by gradient canaries through the code of a run with these options, at its delta.

    None where no canary's gradient can be chosen: where the loss follows from a statistic of the batch.
    """
    job = config.compose([*options, f"seed={seed}"]).job
    if isinstance(job.aggregation, ClientDP):
        clients, delta = job.federation.clients, job.aggregation.budget(job.planned)[1]
        return _bound(_of_clients(job, job.aggregation), clients, delta, seed, canaries, job.federation.rounds)
    if not isinstance(job.privacy, ExampleDP):
        return None
    data = job.data.load()
    n = len(data.train) // job.federation.clients
    size, epochs, rounds = job.local.batch_size, job.local.epochs, job.federation.rounds
    transform = job.privacy.planned(n, size, epochs, rounds)
    of_records = through(transform, batch_size=size, epochs=epochs)
    return _bound(of_records, n, job.privacy.delta, seed, canaries, rounds)


def _bound(mechanism: Audited, n: int, delta: float, seed: int, canaries: int, rounds: int) -> float:
    repeats = -(-canaries // n)
    return one_run(mechanism, canaries=n, length=_LENGTH, seed=seed, delta=delta, steps=rounds, repeats=repeats)


def _of_clients(job: Job, aggregation: ClientDP) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """A round of the server, whose clients' updates are given."""

    def mechanism(updates: Tensor, rng: np.random.Generator) -> Tensor:
        plan = job.planned
        there = np.flatnonzero(rng.random(len(updates)) < sampling_of(plan).rate)
        fresh = type(plan)(plan.clients, plan.rounds, int(rng.integers(2**31)), plan.participation)  # of the noise
        occasion = Occasion(1, 1, there.tolist())
        asked = {"w": np.zeros(updates.shape[1])}
        session = aggregation.open(asked, occasion, aggregation.begin(fresh), fresh, lambda questions: {})
        for client in there:
            session.add(int(client), {"w": updates[client].float().numpy()})
        return torch.from_numpy(session.finish().change["w"])

    return mechanism
