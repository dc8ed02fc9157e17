"""Canaries through the code that a run claims something of: of its records' gradients, and of its clients' updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fedssl.aggregation.base import Planned as Schedule
from fedssl.privacy.audit.federation import Federation
from fedssl.privacy.audit.mechanism import one_run, repeated_runs, through
from fedssl.privacy.audit.worlds import worlds
from fedssl.privacy.record_dp import Planned
from simulations.audits.target import Claim, Run

GRADIENTS, TWO_WORLDS, CLIENTS = "gradient canaries", "repeated steps", "client canaries"
_CANARIES = 2000  # at least, over all repetitions
_LENGTH = 1e3  # of a canary's gradient, far above any clipping norm
_STEPS = 4000  # of both worlds, over all repetitions
_ROUNDS = 12_000  # the same of an aggregation
_FEWEST, _MOST = 30, 500  # repetitions of each world


@dataclass(frozen=True)
class Game:
    """A claim that canaries can be held against, and how."""

    name: str
    claim: Claim
    federation: Federation | None = None  # of clients; None: the claim is of records

    def bound(self, target: Run, confidence: float) -> float:
        """The lower bound of epsilon that it shows."""
        if self.federation is None:
            return _of_records(target, self.claim, confidence)
        rounds = 2 * self.federation.rounds * self.federation.senders
        scores = self.federation.two_worlds(runs=_times(_ROUNDS, rounds), seed=target.seed)
        return scores.epsilon(delta=self.claim.delta, confidence=confidence)

    def estimate(self, target: Run) -> float | None:
        """Of clients, what the final model alone would tell; an estimate, no bound."""
        if self.federation is None:
            return None
        return self.federation.estimate(seed=target.seed, delta=self.claim.delta)


def games(target: Run) -> Iterator[Game]:
    """One for each claim that has an epsilon and a mechanism that canaries can go through."""
    for claim in target.claims:
        if claim.epsilon is None:
            continue
        if claim.unit == "record":
            yield Game(GRADIENTS if _worlds(target) is None else TWO_WORLDS, claim)
            continue
        job, last = target.job, int(target.rundir.rows()[-1]["round"])
        schedule: Schedule = job.planned
        if (federation := Federation.of(job.aggregation, schedule, last)) is not None:
            yield Game(CLIENTS, claim, federation)


def _busiest(target: Run) -> int:
    """The client with the most updates."""
    done = target.steps
    return max(done, key=lambda each: (len(done[each]), sum(steps or 0 for steps in done[each]), -each))


def _transform(target: Run) -> Any:
    """What trains that client."""
    job, client = target.job, _busiest(target)
    return job.privacy.planned(len(target.parts[client]), job.local.batch_size, job.local.epochs, job.rounds_of(client))


def _worlds(target: Run) -> Any:
    transform = _transform(target)
    return worlds(transform, target.job.method) if isinstance(transform, Planned) else None


def _of_records(target: Run, claim: Claim, confidence: float) -> float:
    """The gradients' code, as often as for the client with the most updates."""
    size, epochs, client = target.job.local.batch_size, target.job.local.epochs, _busiest(target)
    done, transform = target.steps[client], _transform(target)
    if (two := _worlds(target)) is not None:
        steps = sum(cast(Planned, transform).steps if steps is None else steps for steps in done)
        release = two.release(batch_size=size, epochs=epochs, rounds=done)
        scores = repeated_runs(
            release, two.direction(release, seed=target.seed), runs=_times(_STEPS, 2 * steps), seed=target.seed
        )
        return scores.epsilon(delta=claim.delta, confidence=confidence)
    n, rounds = len(target.parts[client]), itertools.cycle(done)  # canaries for all of its records, again and again

    def mechanism(gradients: Any, rng: np.random.Generator) -> Any:
        return through(transform, batch_size=size, epochs=epochs, limit=next(rounds))(gradients, rng)

    return one_run(
        mechanism,
        canaries=n,
        length=_LENGTH,
        seed=target.seed,
        delta=claim.delta,
        confidence=confidence,
        steps=len(done),
        repeats=math.ceil(_CANARIES / n),
    )


def _times(budget: int, cost: int) -> int:
    return min(_MOST, max(_FEWEST, budget // max(1, cost)))
