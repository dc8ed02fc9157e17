"""Shadow runs: the same federation on random halves of its clients' examples, and the attack that reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedssl import seeds
from fedssl.config import Plan
from fedssl.datasets.halved import coins
from fedssl.errors import ConfigError
from fedssl.partition.base import owner_of, parts_of
from fedssl.partition.stored import write_split
from fedssl.privacy.audit.attacks import Attack
from fedssl.privacy.audit.bounds import guess_bound
from fedssl.privacy.audit.shadows import excess, likelihood_ratio
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory
from simulations.audits.target import Claim, Run

ABOUT = "EncoderMI-T, compared with shadow runs"


def train(target: Run, count: int) -> list[RunDirectory]:
    """Run or resume so many shadow runs, in the folder `shadows` of the run.

    Raises:
        ConfigError: fewer than three, or a client of which a half may be empty.
    """
    if count < 3:
        raise ConfigError(f"--shadows {count} is too few to compare each with the others: give 3, better 8 or 16")
    runs = []
    for i in range(count):
        plan = _plan(target, i)
        run = plan.open()
        if not run.done:
            reporter = Reporter()
            reporter.say(f"shadow run {i + 1} of {count}")
            plan.build_engine().run(plan.job, run, reporter)
        runs.append(run)
    return runs


def attack(target: Run, runs: list[RunDirectory], own: tuple[Any, Any]) -> tuple[Attack, Attack, Game]:
    """The attack on the run itself, that on the shadow runs, and what a lower bound can be read from.

    Args:
        target: the run.
        runs: its shadow runs.
        own: the statistics of members and others under the run's own model.
    """
    n, k = len(target.data.train), len(runs)
    included = np.stack([coins(n, target.seed, i)[target.members] for i in range(k)])
    measured = [target.statistics(run) for run in runs]
    inside, outside = (np.stack([_scaled(each[group]) for each in measured]) for group in (0, 1))
    spare = seeds.stream(target.seed, "audit", "spare").random(outside.shape) < 0.5
    on_run = Attack(
        "LiRA, this run",
        excess(_scaled(own[0]), inside, ~included),
        excess(_scaled(own[1]), outside, ~spare),
        f"{ABOUT} without the example ({k})",
    )
    ratios = []
    for i in range(k):
        rest = np.arange(k) != i
        ratios.append(likelihood_ratio(inside[i], inside[rest], included[rest]))
    scores = np.stack(ratios)
    about = f"{ABOUT} with and without the example ({k - 1})"
    on_shadows = Attack("LiRA, shadow runs", scores[included], scores[~included], about)
    return on_run, on_shadows, Game(scores[0], included[0], Claim.all_of(runs[0]))


@dataclass(frozen=True, eq=False)
class Game:
    """The first shadow run, whose members were drawn by coins; its attacker knows those of all others.

    One run, because guesses that read other runs' coins are not independent of each other over runs.

    Attributes:
        scores, coins: (n,).
        claims: of that run, which has half as many records and so epsilons of its own.
    """

    scores: Any
    coins: Any
    claims: list[Claim]

    def bound(self, claim: Claim, confidence: float) -> float:
        """The lower bound that speaks of this claim, as `judged` says whether any does.

        To a claim for clients, a record more is another client: two steps, unless clients are replaced in one.
        """
        halved = claim.unit != "record" and not claim.replaced
        return guess_bound(self.scores, self.coins, delta=claim.delta, confidence=confidence, replaced=halved)

    @staticmethod
    def judged(claim: Claim) -> Claim:
        """The claim, or an empty one: a coin changes how many records a client has.

        A claim for records is silent on that if it is about replaced ones, or takes their number as public.
        """
        silent = claim.unit == "record" and (claim.replaced or claim.counted)
        return replace(claim, epsilon=None) if silent else claim


def _scaled(statistics: Any) -> Any:
    """(n,) Fisher's z of the mean cosine, which is closer to a normal distribution than the cosine."""
    return np.arctanh(np.clip(statistics["encoder views"].mean(1), -1 + 1e-6, 1 - 1e-6))


def _plan(target: Run, i: int) -> Plan:
    job, folder = target.job, target.rundir.path / "shadows"
    owner = owner_of(target.parts)
    kept = coins(len(owner), target.seed, i)
    parts = parts_of(owner[kept], job.federation.clients)
    if empty := [client for client, rows in enumerate(parts) if len(rows) == 0]:
        raise ConfigError(
            f"client {empty[0]} has {len(target.parts[empty[0]])} examples and none in shadow run {i}: audit a run "
            "with more examples a client (partition.min_size), or without --shadows"
        )
    path = folder / f"split-{i:02d}.npz"
    write_split(path, parts)
    split = {"_target_": "fedssl.partition.Stored", "path": str(path), "fingerprint": None}
    shift = str(job.tree["partition"]["_target_"]).endswith(".FeatureShift")
    tree = {
        **job.tree,
        "seed": seeds.key(job.seed, "audit", "shadow", i) % 2**31,  # noise and initial values of its own
        "baselines": False,
        "checkpoint_every": job.federation.rounds,
        "evaluate": {**job.tree["evaluate"], "every": 0, "final": False},
        "data": {
            "_target_": "fedssl.datasets.halved.Halved",
            "source": job.tree["data"],
            "seed": target.seed,
            "run": i,
            "augment": job.tree["data"]["augment"],
        },
        "partition": {**job.tree["partition"], "base": split} if shift else split,
        "engine": dict(target.plan.engine),
        "name": f"{i:02d}",
        "out": str(folder),
    }
    return Plan.of(tree)
