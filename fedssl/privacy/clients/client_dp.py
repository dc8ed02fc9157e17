"""Client-level differential privacy by a trusted server: clip updates, noise their sum, divide by a constant."""

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
from fedssl.privacy.accountant import noise_multiplier
from fedssl.privacy.clients.flat import clip, length
from fedssl.privacy.ledger import Entry
from fedssl.privacy.statement import Declared

CLIP = "clip_norm"  # in the memory and in what clients are told
BELOW = "aggregation.below"  # in an update: 1 if it was not clipped, else 0


@dataclass(frozen=True)
class ClientDP:
    """DP-FedAvg (McMahan et al. 2018, https://arxiv.org/abs/1710.06963) with a flat clip and a fixed divisor.

    The update of a client is one vector: every array that it sends, buffers and counters too. The server's mean is
    `(sum of clipped updates + N(0, (noise_multiplier * clip)^2)) / (expected clients)`. A client more or less moves the
    sum by at most `clip`, and the divisor is a public number, so every merge rule, optimiser and EMA after it is
    post-processing. A round to which nobody comes is noise alone.

    Attributes:
        clip: the L2 norm to which an update is shortened; where it is adapted, that of the first round.
        noise_multiplier: standard deviation of the noise over the clip norm; or null, and then
        target_epsilon: what the planned rounds may cost together. The noise is solved for it, and no round exceeds it.
        delta: null: clients^-1.1, refused above 1e-3.
        quantile: adapt the clip norm to this quantile of the updates' norms (Andrew et al. 2021,
            https://arxiv.org/abs/1905.03871), in (0, 1); null: it stays.
        adapt_rate: how quickly, above 0: the norm shrinks by exp(-rate * (share below it - quantile)).
        bit_noise: standard deviation on the sum of the bits "below", each centred to +-1/2; null: a twentieth of the
            expected clients. It is paid for: the updates get a little more noise, so that both together cost what
            noise_multiplier says.
        weight_cap: null counts every client once; a number weighs a client by min(examples, cap) / cap, below a
            divisor that stays what it is, so that many small clients make small steps.
        secure: noise and cohorts from the operating system, for deployments; nothing repeats then.
    """

    clip: float = 1.0
    noise_multiplier: float | None = 1.0
    target_epsilon: float | None = None
    delta: float | None = None
    quantile: float | None = None
    adapt_rate: float = 0.2
    bit_noise: float | None = None
    weight_cap: int | None = None
    secure: bool = False
    each: ClassVar[bool] = False
    private_uploads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        claims.check_noise(self.noise_multiplier, self.target_epsilon, self.clip)
        if self.quantile is not None and not (0 < self.quantile < 1 and self.adapt_rate > 0):
            raise ConfigError(
                f"aggregation.quantile={self.quantile} and adapt_rate={self.adapt_rate} adapt no clip norm: give a "
                "quantile in (0, 1) and a rate above 0, or quantile=null"
            )
        if not (self.bit_noise is None or self.bit_noise > 0) or not (self.weight_cap is None or self.weight_cap >= 1):
            raise ConfigError(
                f"aggregation.bit_noise={self.bit_noise} must be above 0 and weight_cap={self.weight_cap} at least 1: "
                "give such numbers, or null"
            )

    @property
    def secret_cohorts(self) -> bool:
        """What is claimed of a Poisson sample holds against those who do not know it; clients know the run's seed."""
        return self.secure

    def admit(self, plan: Planned) -> None:
        """Refuse participation without an accountant, a delta without meaning, and noise that bits use up.

        Raises:
            PrivacyError: for the first of them.
        """
        sampling_of(plan)
        claims.delta_of(self.delta, plan.clients)
        self.noises(plan)

    def multiplier(self, plan: Planned) -> float:
        """Of all that a round releases: standard deviation over sensitivity."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        sampling, delta = sampling_of(plan), claims.delta_of(self.delta, plan.clients)
        target = float(self.target_epsilon or 0)
        if sampling.rate == 1:
            return claims.gaussian_multiplier(target, sampling.turns, delta)
        return noise_multiplier(target, sampling.rate, plan.rounds, delta)

    def noises(self, plan: Planned) -> tuple[float, float]:
        """Of the updates, over the clip norm, and on the sum of bits; 0 where there are no bits.

        Two Gaussian releases of the same clients are one: sigma^-2 = sigma_updates^-2 + (2 sigma_bits)^-2, because a
        client moves the sum of bits that are +-1/2 by 1/2.

        Raises:
            PrivacyError: the bits alone say more than both may.
        """
        total = self.multiplier(plan)
        if self.quantile is None:
            return total, 0.0
        bits = sampling_of(plan).expected / 20 if self.bit_noise is None else self.bit_noise
        if 2 * bits <= total:
            raise PrivacyError(
                f"bits with noise {bits:.3g} say more of a client than noise_multiplier={total:.3g} allows for both: "
                f"use aggregation.bit_noise above {total / 2:.3g}, or aggregation.quantile=null"
            )
        return float((total**-2 - (2 * bits) ** -2) ** -0.5), bits

    def begin(self, plan: Planned) -> Memory:
        """The first clip norm."""
        return Memory(numbers={CLIP: self.clip})

    def send(self, change: Arrays, told: Told, sender: Sender) -> Arrays:
        """Clipped already, since nobody needs more; the server clips again what it cannot trust.

        What is not finite goes as it is: only the server can count it without telling anybody.
        """
        bound = float(told[CLIP])
        weight = 1.0 if self.weight_cap is None else min(sender.examples, self.weight_cap) / self.weight_cap
        clipped, norm = clip(change, bound, weight)
        wire = to_wire(change if math.isnan(norm) else clipped)
        return wire if self.quantile is None else wire | {BELOW: np.array(norm <= bound, np.float32)}

    def open(self, asked: Arrays, occasion: Occasion, memory: Memory, plan: Planned, ask: Ask) -> _Session:
        """See `Aggregation`."""
        return _Session(self, asked, occasion, memory.numbers[CLIP], plan)

    def up_bytes(self, asked: Mapping[str, np.ndarray]) -> int:
        """Four bytes an entry, and the bit."""
        return wire_bytes(asked) + 4 * (self.quantile is not None)

    def entry(self, plan: Planned, at: int, attempt: int) -> Entry:
        """One release a round; of cohorts that take turns, one a cycle, for no client is in two of its rounds."""
        sampling = sampling_of(plan)
        again = sampling.sampler == "cohorts" and (at - 1) % sampling.separation and attempt == 1
        return Entry(at, attempt, "mean of clients", self.multiplier(plan), sampling.rate, 0 if again else 1)

    def budget(self, plan: Planned) -> tuple[float | None, float]:
        """The target, if there is one."""
        return self.target_epsilon, claims.delta_of(self.delta, plan.clients)

    def declaration(self, plan: Planned) -> Declared:
        """See `Private`."""
        sampling = sampling_of(plan)
        words = {
            "poisson": f"poisson, rate {sampling.rate:g}",
            "fixed": f"{sampling.expected:g} clients a round; no amplification",
            "cohorts": f"{sampling.separation} cohorts in turn; no amplification",
        }
        released = "the noised mean of clipped changes" + ("" if self.quantile is None else ", and the clip norms")
        adversary = "everybody who sees the released models; the server is trusted"
        return claims.declare(
            adversary, sampling.relation, words[sampling.sampler], released, self.secure, self.budget(plan)
        )

    def remarks(self, plan: Planned, size: int) -> Sequence[str]:
        """How long the noise is."""
        over = self.noises(plan)[0] * math.sqrt(size) / sampling_of(plan).expected
        return [
            f"client-level noise: its norm on the mean is {over:.3g} clip norms, where the mean has at most 1 "
            f"({size:,} numbers, {sampling_of(plan).expected:g} clients expected a round)"
        ]


@dataclass
class _Session:
    config: ClientDP
    asked: Arrays
    occasion: Occasion
    bound: float
    plan: Planned
    sums: Arrays = field(init=False)
    bits: float = 0.0  # sum of the centred ones
    odd: int = 0

    def __post_init__(self) -> None:
        self.sums = {key: np.zeros(value.shape) for key, value in self.asked.items()}

    def told(self, client: int) -> Told:
        return {CLIP: self.bound}

    def add(self, client: int, wire: Arrays) -> None:
        bit = wire.pop(BELOW, None)
        check_wire(wire, self.asked, f"client {client}")
        clipped, norm = clip(wire, self.bound)
        if math.isnan(norm):
            self.odd += 1
            return  # neither an update nor a bit
        for key, value in clipped.items():
            self.sums[key] += value
        if bit is not None and self.config.quantile is not None:
            self.bits += 0.5 if float(bit.reshape(-1)[0]) > 0.5 else -0.5

    def finish(self) -> Outcome:
        config, at, attempt = self.config, self.occasion.round, self.occasion.attempt
        (spread, bit_spread), expected = config.noises(self.plan), sampling_of(self.plan).expected
        noise = Noise(self.plan.seed, config.secure)
        change = {
            key: (value + spread * self.bound * noise.normal(value.shape, at, attempt, key)) / expected
            for key, value in sorted(self.sums.items())
        }
        size = sum(value.size for value in change.values())
        row = {CLIP: self.bound, "noise_norm": spread * self.bound * math.sqrt(size) / expected}
        row |= {"change_norm": length(change)} | ({"not_finite": self.odd} if self.odd else {})
        following = self.bound
        if config.quantile is not None:
            noisy = self.bits + bit_spread * float(noise.normal((), at, attempt, BELOW))
            following = adapted(self.bound, noisy / expected + 0.5, config.quantile, config.adapt_rate)
        return Outcome(change, Memory(numbers={CLIP: following}), row)


def adapted(bound: float, below: float, quantile: float, rate: float) -> float:
    """The next clip norm: smaller if more than the quantile of the updates were not clipped, else larger.

    Args:
        bound: the present one.
        below: the noisy share of updates that were at most as long; any number.
        quantile: the share that is wanted.
        rate: of the geometric step.

    References:
        Andrew et al. 2021, https://arxiv.org/abs/1905.03871, section 2.1
    """
    return bound * math.exp(-rate * (min(max(below, 0.0), 1.0) - quantile))
