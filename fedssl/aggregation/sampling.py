"""What a participation means for accounting: who is drawn how, how often, and how far apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from fedssl.aggregation.base import Planned
from fedssl.errors import PrivacyError
from fedssl.participation.cohorts import Cohorts
from fedssl.participation.synchronous import Synchronous


@dataclass(frozen=True)
class Sampling:
    """The sampler that a run's participation really is.

    Attributes:
        sampler: poisson (every client on its own), fixed (so many each round) or cohorts (in turn).
        relation: of neighbours, for which the clipped sum moves by one clip norm: add_remove, or zero_out (a client's
            contributions are zeros instead, and who takes part stays the same).
        rate: with which accountants amplify; 1 where nothing may be claimed.
        expected: clients a round, a public number whoever comes: the divisor of every mean.
        turns: in at most so many rounds a client takes part.
        separation: rounds from one turn of a client to its next, at least.
    """

    sampler: str
    relation: str
    rate: float
    expected: float
    turns: int
    separation: int


def sampling_of(plan: Planned) -> Sampling:
    """The sampler of a run.

    Availability, dropout and deadlines only let a client take part less often than it is drawn, by rules that do not
    read its data, so that the rate stays an upper bound and the guarantee holds.

    Raises:
        PrivacyError: the participation is one for which nothing can be claimed.
    """
    chosen, clients, rounds = plan.participation, plan.clients, plan.rounds
    if isinstance(chosen, Cohorts):
        turns = -(-rounds // chosen.groups)
        return Sampling("cohorts", "zero_out", 1.0, clients / chosen.groups, turns, chosen.groups)
    if isinstance(chosen, Synchronous):
        if chosen.draw == "poisson":
            return Sampling("poisson", "add_remove", chosen.fraction, chosen.fraction * clients, rounds, 1)
        cohort = max(1, round(chosen.fraction * clients))
        return Sampling("fixed", "zero_out", 1.0, float(cohort), rounds, 1)
    raise PrivacyError(
        f"participation={type(chosen).__name__.lower()} follows the clients' pace or another run, and nothing here "
        "accounts for that: use participation=poisson, uniform or cohorts"
    )


@lru_cache(maxsize=4)
def most_turns(plan: Planned) -> tuple[int, ...]:
    """After each round, the turns of the client that has had most, by the run's own schedule."""
    counts: Counter[int] = Counter()
    most = []
    for at in range(1, plan.rounds + 1):
        counts.update(turn.client for turn in plan.participation.plan(plan.clients, at, plan.seed).turns)
        most.append(max(counts.values(), default=0))
    return tuple(most)
