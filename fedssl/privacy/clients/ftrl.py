"""DP-FTRL with banded noise: client-level privacy for cohorts that take turns, without any sampling."""

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
from fedssl.aggregation.sampling import sampling_of
from fedssl.errors import ConfigError, PrivacyError
from fedssl.parts import Arrays
from fedssl.privacy.clients import banded
from fedssl.privacy.clients.flat import clip, length
from fedssl.privacy.ledger import Entry
from fedssl.privacy.statement import Declared


@dataclass(frozen=True)
class FTRL:
    """Banded matrix noise (Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153) on clipped changes.

    The server releases in round t `(sum of clipped changes + noise_t) / (expected clients)`, where the noise of a round
    takes back a part of that of the `band - 1` rounds before; see `fedssl.privacy.clients.banded`. The whole run is one
    Gaussian release. Needs cohorts whose members wait at least `band` rounds: `participation=cohorts`. With band=1 the
    noise is independent, and anybody may come at any time.

    Attributes:
        clip: the L2 norm to which an update is shortened.
        noise_multiplier: standard deviation of the fresh noise over how far one client moves the whole run; or null,
        target_epsilon: and then what the planned rounds cost together.
        delta: null: clients^-1.1, refused above 1e-3.
        band: rounds that share noise; the server keeps band - 1 models of it.
        secure: noise from the operating system, for deployments; nothing repeats then.
    """

    clip: float = 1.0
    noise_multiplier: float | None = 1.0
    target_epsilon: float | None = None
    delta: float | None = None
    band: int = 4
    secure: bool = False
    each: ClassVar[bool] = False
    private_uploads: ClassVar[bool] = False
    secret_cohorts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        claims.check_noise(self.noise_multiplier, self.target_epsilon, self.clip)
        if self.band < 1:
            raise ConfigError(f"aggregation.band={self.band} rounds share no noise: give at least 1")

    def admit(self, plan: Planned) -> None:
        """Refuse participation that does not keep clients `band` rounds apart, and a delta without meaning.

        Raises:
            PrivacyError: for the first of them.
        """
        sampling = sampling_of(plan)
        if sampling.separation < self.band:
            raise PrivacyError(
                f"with this participation a client may come again after {sampling.separation} rounds, and "
                f"aggregation.band={self.band} shares noise for longer: use participation=cohorts with "
                f"participation.groups={self.band} or more, or aggregation.band={sampling.separation}"
            )
        claims.delta_of(self.delta, plan.clients)

    def sensitivity(self, plan: Planned) -> float:
        """How far a client whose changes have norm 1 moves the whole run."""
        return banded.sensitivity(banded.square_root(self.band), plan.rounds, sampling_of(plan).separation)

    def multiplier(self, plan: Planned) -> float:
        """Of the whole run: standard deviation over sensitivity."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        return claims.gaussian_multiplier(float(self.target_epsilon or 0), 1, claims.delta_of(self.delta, plan.clients))

    def begin(self, plan: Planned) -> Memory:
        """No noise."""
        return Memory()

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """Clipped already; what is not finite goes as it is, and the server leaves it out."""
        clipped, norm = clip(change, self.clip)
        return to_wire(change if math.isnan(norm) else clipped)

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> _Session:
        """See `Aggregation`."""
        return _Session(self, asked, occasion, memory, plan)

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Four bytes an entry."""
        return wire_bytes(asked)

    def entry(self, plan: Planned, at: int, attempt: int) -> Entry:
        """The whole run in its first round; later ones add nothing.

        A round that is repeated releases one row of C x once more with fresh noise. A client that is at least a band
        away from itself moves that row by at most the first, largest coefficient, which is 1.
        """
        multiplier = self.multiplier(plan)
        if attempt > 1:
            return Entry(at, attempt, "a round again", multiplier * self.sensitivity(plan), 1.0, 1)
        return Entry(at, attempt, "the whole run", multiplier, 1.0, 1 if at == 1 else 0)

    def budget(self, plan: Planned) -> tuple[float | None, float]:
        """The target, if there is one."""
        return self.target_epsilon, claims.delta_of(self.delta, plan.clients)

    def declaration(self, plan: Planned) -> Declared:
        """See `Private`."""
        sampling = sampling_of(plan)
        words = f"turns at least {sampling.separation} rounds apart; nothing is sampled"
        adversary = "everybody who sees the released models, and who takes part when; the server is trusted"
        return claims.declare(
            adversary, "zero_out", words, "the mean changes with banded noise", self.secure, self.budget(plan)
        )

    def remarks(self, plan: Planned, size: int) -> Sequence[str]:
        """How long the noise is."""
        over = self.multiplier(plan) * self.sensitivity(plan) * math.sqrt(size) / sampling_of(plan).expected
        return [
            f"banded noise: the norm of a round's fresh noise on the mean is {over:.3g} clip norms, where the mean has "
            f"at most 1 ({size:,} numbers, {sampling_of(plan).expected:g} clients a round)"
        ]


@dataclass
class _Session:
    config: FTRL
    asked: Arrays
    occasion: Occasion
    memory: Memory  # the rows of noise of the rounds before, "1/name" the last one
    plan: Planned
    sums: Arrays = field(init=False)
    odd: int = 0

    def __post_init__(self) -> None:
        self.sums = {key: np.zeros(value.shape) for key, value in self.asked.items()}

    def told(self, client: int) -> Told:
        return {}

    def add(self, client: int, wire: Arrays) -> None:
        check_wire(wire, self.asked, f"client {client}")
        clipped, norm = clip(wire, self.config.clip)
        self.odd += math.isnan(norm)
        for key, value in clipped.items():
            self.sums[key] += value

    def finish(self) -> Outcome:
        config, at, attempt = self.config, self.occasion.round, self.occasion.attempt
        coefficients, rows = banded.square_root(config.band), self.memory.arrays
        spread = config.multiplier(self.plan) * config.sensitivity(self.plan) * config.clip
        noise, expected = Noise(self.plan.seed, config.secure), sampling_of(self.plan).expected
        change: Arrays = {}
        kept: Arrays = {}
        for key, value in sorted(self.sums.items()):
            earlier = [rows[f"{j}/{key}"] for j in range(1, config.band) if f"{j}/{key}" in rows]
            row = banded.correlated(coefficients, noise.normal(value.shape, at, attempt, key), earlier)
            change[key] = (value + spread * row) / expected
            kept |= {f"{j}/{key}": r for j, r in enumerate([row, *earlier], 1) if j < config.band}
        size = sum(value.size for value in change.values())
        told = {"clip_norm": config.clip, "noise_norm": spread * math.sqrt(size) / expected}
        told |= {"change_norm": length(change)} | ({"not_finite": self.odd} if self.odd else {})
        return Outcome(change, Memory(kept), told)
