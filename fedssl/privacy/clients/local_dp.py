"""Local differential privacy: every client clips its update and adds noise before anybody sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedssl.aggregation import claims
from fedssl.aggregation.base import (
    Ask,
    Memory,
    Occasion,
    Outcome,
    Planned,
    Sender,
    Told,
    check_wire,
    to_wire,
    wire_bytes,
)
from fedssl.aggregation.noise import Noise
from fedssl.aggregation.sampling import most_turns, sampling_of
from fedssl.errors import PrivacyError
from fedssl.parts import Arrays
from fedssl.privacy.clients.flat import clip, length
from fedssl.privacy.ledger import Entry
from fedssl.privacy.statement import Declared
from fedssl.tree import ExactMean

SPREAD = "spread"  # told to a client: standard deviation of its noise


@dataclass(frozen=True)
class LocalDP:
    """Gaussian noise on each client; nobody is trusted, neither the server nor who listens.

    Any two updates are neighbours, and two of length at most `clip` are at most `2 clip` apart: the noise has the
    standard deviation `noise_multiplier * 2 clip` on every number. Nothing is amplified by sampling, for the server
    sees who has sent. The privacy of a client is that of its own turns, which the schedule fixes beforehand. The
    server's mean is over those that come; a round without anybody is skipped.

    The noise is usually far longer than what it hides, see `remarks`: this is a demonstration more than a method.

    Attributes:
        clip: the L2 norm to which an update is shortened.
        noise_multiplier: standard deviation of the noise over the sensitivity `2 clip`; or null, and then
        target_epsilon: what the client with most turns may spend in the planned rounds; the noise is solved for it by
            the exact Gaussian curve, not by the classical formula, which holds below epsilon 1 only.
        delta: null: clients^-1.1, refused above 1e-3.
        secure: noise from the operating system. Without it the noise comes from the run's seed, which the server knows:
            a simulation of local privacy, not the thing.
    """

    clip: float = 1.0
    noise_multiplier: float | None = None
    target_epsilon: float | None = 8.0
    delta: float | None = None
    secure: bool = False
    each: ClassVar[bool] = False
    private_uploads: ClassVar[bool] = True
    secret_cohorts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        claims.check_noise(self.noise_multiplier, self.target_epsilon, self.clip)

    def admit(self, plan: Planned) -> None:
        """Refuse participation whose turns are not known beforehand, and a delta without meaning.

        Raises:
            PrivacyError: for the first of them.
        """
        sampling_of(plan)
        claims.delta_of(self.delta, plan.clients)

    def multiplier(self, plan: Planned) -> float:
        """Of one turn: standard deviation over sensitivity."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        turns, delta = max(1, most_turns(plan)[-1]), claims.delta_of(self.delta, plan.clients)
        return claims.gaussian_multiplier(float(self.target_epsilon or 0), turns, delta)

    def begin(self, plan: Planned) -> Memory:
        """Nothing."""
        return Memory()

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """Clipped, with noise; one that is not finite is sent as zeros with noise, which nobody can tell apart."""
        clipped, _ = clip(change, self.clip)
        noise, spread = Noise(sender.seed, self.secure), float(told[SPREAD])
        path = ("client", sender.client, sender.round, sender.attempt)
        return to_wire({key: value + spread * noise.normal(value.shape, *path, key) for key, value in clipped.items()})

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> _Session:
        """See `Aggregation`."""
        return _Session(asked, 2 * self.clip * self.multiplier(plan))

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Four bytes an entry."""
        return wire_bytes(asked)

    def entry(self, plan: Planned, at: int, attempt: int) -> Entry:
        """A turn more, if this round is one for the client that has had most; of a repeated round always."""
        most = (0, *most_turns(plan))
        count = most[at] - most[at - 1] if attempt == 1 else 1
        return Entry(at, attempt, "changes of a client", self.multiplier(plan), 1.0, count)

    def turn(self, plan: Planned, at: int, attempt: int) -> Entry:
        """See `OwnAccount`."""
        return Entry(at, attempt, "own changes", self.multiplier(plan), 1.0, 1)

    def assure(self, plan: Planned, told: Told) -> None:
        """See `OwnAccount`: the noise is the job's own, and the server's word can only add to it."""
        least, said = 2 * self.clip * self.multiplier(plan), float(told.get(SPREAD, 0.0))
        if not said >= least * (1 - 1e-9):
            raise PrivacyError(
                f"the server asks for noise of {said:.6g} where the job's is {least:.6g}, so that this client "
                "would be told apart: it does not train; use a server that runs the job as it is"
            )

    def budget(self, plan: Planned) -> tuple[float | None, float]:
        """The target, if there is one."""
        return self.target_epsilon, claims.delta_of(self.delta, plan.clients)

    def declaration(self, plan: Planned) -> Declared:
        """See `Private`."""
        turns = f"turns known beforehand, at most {most_turns(plan)[-1]} of a client; no amplification"
        adversary = "the server and everybody who sees the clients' messages"
        return claims.declare(
            adversary, "replace_one", turns, "every client's noised change", self.secure, self.budget(plan)
        )

    def remarks(self, plan: Planned, size: int) -> Sequence[str]:
        """How much longer the noise is than what it hides."""
        length, cohort = 2 * self.multiplier(plan) * math.sqrt(size), sampling_of(plan).expected
        return [
            f"local noise: its norm on each update is {length:.4g} times the clip norm of {self.clip:g}, and "
            f"{length / math.sqrt(cohort):.3g} times on the mean of {cohort:g} clients ({size:,} numbers): expect to "
            "learn little unless it is near 1; aggregation=client_dp needs far less"
        ]


@dataclass
class _Session:
    asked: Arrays
    spread: float
    mean: ExactMean = field(default_factory=ExactMean)

    def told(self, client: int) -> Told:
        return {SPREAD: self.spread}

    def add(self, client: int, wire: Arrays) -> None:
        check_wire(wire, self.asked, f"client {client}")
        if not math.isnan(length(wire)):  # post-processing: nothing private is learnt by leaving one out
            self.mean.add(wire, 1.0)

    def finish(self) -> Outcome | None:
        if not self.mean.count:
            return None
        change = self.mean.result({key: np.zeros(value.shape) for key, value in self.asked.items()})
        size = sum(value.size for value in change.values())
        over = self.spread * math.sqrt(size / self.mean.count)
        return Outcome(change, Memory(), {"noise_norm": over, "change_norm": length(change)})
