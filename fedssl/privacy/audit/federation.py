"""Canary clients: an aggregation's own code, round by round, without any training.

Only a canary sends, an update far longer than the clip norm in arrays of every kind: others' updates are the same in
both worlds, so that they add nothing to what tells the worlds apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedssl import seeds
from fedssl.aggregation.base import Memory, Occasion, Planned, Sender
from fedssl.aggregation.sampling import sampling_of
from fedssl.parts import Arrays
from fedssl.privacy.audit.clients import directions, estimate_of, scaled_cosines
from fedssl.privacy.audit.mechanism import Scores, repeated_runs
from fedssl.privacy.clients import banded
from fedssl.privacy.clients.client_dp import CLIP, ClientDP
from fedssl.privacy.clients.ftrl import FTRL
from fedssl.privacy.clients.local_dp import LocalDP
from fedssl.privacy.clients.secure_dp import SecureDP

_LONG = 1e3  # clip norms
_DIM = 2048  # of the estimate's updates
_CANARIES = 25  # of one run: far fewer than numbers, so that their directions are apart
ASKED: Arrays = {  # a scalar and a counter are what clipping forgets most easily
    "weight": np.zeros((2, 2), np.float32),
    "scale": np.zeros((), np.float32),
    "counter": np.zeros((), np.int64),
}
Audited = ClientDP | FTRL | LocalDP | SecureDP


@dataclass(frozen=True)
class Federation:
    """A run's aggregation and what decides who takes part when.

    Attributes:
        aggregation: with its noise solved, so that a plan of another seed has the same.
        plan: of the run.
        rounds: that were done.
    """

    aggregation: Audited
    plan: Planned
    rounds: int

    @classmethod
    def of(cls, aggregation: object, plan: Planned, rounds: int) -> Federation | None:
        """The federation of a run; None if its aggregation claims nothing that canary clients could contradict."""
        if not isinstance(aggregation, Audited):
            return None
        if not isinstance(aggregation, SecureDP):
            aggregation = replace(aggregation, noise_multiplier=aggregation.multiplier(plan), target_epsilon=None)
        return cls(aggregation, plan, rounds)

    def two_worlds(self, *, runs: int, seed: int) -> Scores:
        """Scores of runs with a canary client and without it.

        Where cohorts are a secret sample they are drawn anew in each run, and the score adds up all rounds; elsewhere
        the attacker knows when the client that comes most often came. Banded noise is whitened.
        """
        secret, canary, turns = self._sampled, *self._most()
        weights = np.ones(self.rounds) if secret else np.isin(np.arange(1, self.rounds + 1), turns).astype(float)
        if isinstance(self.aggregation, FTRL):
            c = banded.columns(banded.square_root(self.aggregation.band), self.rounds)
            weights = c.T @ c @ weights

        def release(there: bool, rng: np.random.Generator) -> Tensor:
            noise, cohorts = (int(rng.integers(2**62)) for _ in range(2))
            came = turns
            if secret:
                came = [at for at in range(1, self.rounds + 1) if canary in self._arriving(at, cohorts)]
            return torch.from_numpy(self._released(canary, came if there else [], turns, noise))

        return repeated_runs(release, torch.from_numpy(weights), runs=runs, seed=seed)

    def estimate(self, *, seed: int, delta: float, canaries: int = 400) -> float | None:
        """What `client_canary_estimate` says with the federation's clients as canaries; None if none of them came.

        It reads the sum of all means, as one who has the final model could: an estimate for that attacker, no bound.
        None as well behind masks, where the noise of so many numbers takes minutes.

        Args:
            seed: of their directions and the noise.
            delta: of the claim.
            canaries: at least, over runs of the whole federation.
        """
        found: list[float] = []
        if isinstance(self.aggregation, SecureDP):
            return None
        while len(found) < canaries:
            cosines = self._cosines(int(seeds.stream(seed, "audit", "federation", len(found)).integers(2**62)))
            if not len(cosines):
                return None
            found += cosines.tolist()
        return estimate_of(np.array(found), delta=delta)

    def _cosines(self, seed: int) -> np.ndarray:
        """(k,) of the clients of one run that came, with the sum of what its rounds released."""
        asked: Arrays = {"weight": np.zeros(_DIM, np.float32)}
        came: set[int] = set()
        unit = directions(min(self.plan.clients, _CANARIES), _DIM, seed)
        total, memory = np.zeros(_DIM), self.aggregation.begin(self.plan)
        for at in range(1, self.rounds + 1):
            senders = [client for client in self._arriving(at, self.plan.seed) if client < len(unit)]
            came.update(senders)
            updates = {client: {"weight": 2 * self.aggregation.clip * unit[client]} for client in senders}
            change, memory = self._round(asked, at, updates, memory, seed)
            total += change.get("weight", 0.0)
        return scaled_cosines(total, unit[sorted(came)])

    @property
    def senders(self) -> int:
        """How many have to send in a round of two worlds."""
        return self.aggregation.fewest(self._cohort(1)) if isinstance(self.aggregation, SecureDP) else 1

    @property
    def _sampled(self) -> bool:
        return isinstance(self.aggregation, ClientDP) and sampling_of(self.plan).sampler == "poisson"

    def _arriving(self, at: int, seed: int) -> list[int]:
        return [turn.client for turn in self.plan.participation.plan(self.plan.clients, at, seed).arriving]

    def _cohort(self, at: int) -> int:
        """How many secure aggregation is planned for: all who begin the round."""
        return max(2, len(self.plan.participation.plan(self.plan.clients, at, self.plan.seed).turns))

    def _most(self) -> tuple[int, list[int]]:
        """The client that comes most often, and its rounds."""
        rounds: dict[int, list[int]] = {}
        for at in range(1, self.rounds + 1):
            for client in self._arriving(at, self.plan.seed):
                rounds.setdefault(client, []).append(at)
        return max(rounds.items(), key=lambda item: (len(item[1]), -item[0]), default=(0, []))

    def _released(self, canary: int, sends: list[int], turns: list[int], seed: int) -> np.ndarray:
        """(T,) of each round, what came out along the canary's update, in clip norms."""
        config, out = self.aggregation, np.zeros(self.rounds)
        length = _LONG * config.clip
        update = {key: np.full(value.shape, length) for key, value in ASKED.items()}
        memory = config.begin(self.plan)
        for at in turns if isinstance(config, LocalDP) else range(1, self.rounds + 1):
            bound = memory.numbers.get(CLIP, config.clip)
            if isinstance(config, LocalDP):  # any two updates are neighbours: one, and the opposite one
                update = {key: np.full(value.shape, length if at in sends else -length) for key, value in ASKED.items()}
            change, memory = self._round(
                ASKED, at, {canary: update} if at in sends or isinstance(config, LocalDP) else {}, memory, seed
            )
            out[at - 1] = sum(float(value.sum()) for value in change.values()) / bound
        return out

    def _round(
        self, asked: Arrays, at: int, updates: Mapping[int, Arrays], memory: Memory, seed: int
    ) -> tuple[Mapping[str, np.ndarray], Memory]:
        """What a round of these updates releases, through the code of both sides."""
        config, plan = self.aggregation, replace(self.plan, seed=seed)
        if isinstance(config, SecureDP):
            return _opened(config, asked, at, updates, self._cohort(at), seed), memory
        session = config.open(asked, Occasion(at, 1, sorted(updates)), memory, plan, lambda questions: {})
        for client, update in updates.items():
            session.add(client, config.send(update, session.told(client), Sender(client, at, 1, 1, seed)))
        outcome = session.finish()
        return ({}, memory) if outcome is None else (outcome.change, outcome.memory)


def _opened(
    config: SecureDP, asked: Arrays, at: int, updates: Mapping[int, Arrays], clients: int, seed: int
) -> Mapping[str, np.ndarray]:
    """The mean that secure aggregation opens if the fewest clients survive; others send zeros, with their noise."""
    keys, size = sorted(asked), sum(value.size for value in asked.values())
    senders = [*updates, *(c for c in range(clients) if c not in updates)][: max(config.fewest(clients), len(updates))]
    grid, total = config.grid(clients, size), np.zeros(size, f"u{config.bits // 8}")
    for client in senders:
        update = updates.get(client, {key: np.zeros(asked[key].shape) for key in keys})
        values = np.concatenate([update[key].ravel() for key in keys])
        total = total + config.encode(values, clients, Sender(client, at, 1, 1, seed))
    mean = grid.mean(total, len(senders))
    ends = np.cumsum([asked[key].size for key in keys])[:-1]
    return {key: part.reshape(asked[key].shape) for key, part in zip(keys, np.split(mean, ends), strict=True)}
