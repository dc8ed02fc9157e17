"""Clients that lie: model poisoning and a backdoor against what a server can put between them and the model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedssl import config, diagnostics, probes
from fedssl.errors import ConfigError
from fedssl.intervals import both
from fedssl.report.charts import Panel
from fedssl.rundir import RunDirectory
from simulations.attacks import liars
from simulations.attacks.backdoor import Backdoor, triggered
from simulations.attacks.poison import Attack, Noise, Replacement, SignFlip
from simulations.studies.base import Bench, Finding, Outcome
from simulations.studies.federated.cells import partition
from simulations.studies.federated.measures import FIVE, KNN, LINEAR, RANK, Probed
from simulations.studies.federated.results import Results, columns
from simulations.studies.tools.runs import Finished

HONEST, UNTRAINED = "nobody", "untrained encoder"
FLIP, NOISE, REPLACED, BACKDOOR = "sign flip", "noise", "replacement", "backdoor"
SUCCESS = "backdoor success"
RULES: Mapping[str, tuple[str, ...]] = {
    "fedavg": ("strategy=fedavg",),
    "bounded": ("strategy=fedavg", "aggregation=bounded"),
    "median": ("strategy=fedmedian",),
    "trimmed mean": ("strategy=fedtrimmedavg",),
    "krum": ("strategy=krum",),
    "bulyan": ("strategy=bulyan",),
}
Key = tuple[str, str]  # rule, attack


@dataclass(frozen=True)
class Attackers:
    """Every attack against every rule, beside the same rule among honest clients.

    Krum, Bulyan and the trimmed mean are told how many clients lie, and the bound is the median length of an honest
    client's change under FedAvg: the defenders know what a real one has to guess.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, each with its own split and weights; 1 or more, intervals need 2.
        rules: of `RULES`.
        attacks: of sign flip, noise, replacement, backdoor.
        clients: of all runs; Bulyan wants 4 for each that lies, and 3 more.
        liars: how many of them lie, the first ones.
        skew: the split, see `cells.partition`.
        scale: of sign flip and noise, over the length of an honest change.
        stretch: of the backdoor's change.
        bound: of `bounded`, over the median length of an honest change.
        margin: points of accuracy (of 1) that count as nothing lost, and of backdoor success as nothing won.
        rounds: of all runs.
        width: of the encoder, whose features have four times as many numbers.
        lr: high, so that as few steps lead far.
        batch_size: small, so that clients take many steps.
    """

    tiny: bool = False
    seeds: int = 3
    rules: tuple[str, ...] = tuple(RULES)
    attacks: tuple[str, ...] = (FLIP, NOISE, REPLACED, BACKDOOR)
    clients: int = 12
    liars: int = 2
    skew: str = "iid"
    scale: float = 3.0
    stretch: float = 3.0
    bound: float = 1.0
    margin: float = 0.05
    rounds: int = 8
    width: int = 8
    lr: float = 0.005
    batch_size: int = 32

    def run(self, bench: Bench) -> Outcome:
        """Run and measure every pair of rule and attack.

        Raises:
            ConfigError: an unknown rule or attack, or nobody who lies or is honest.
        """
        if not 0 < self.liars < self.clients:
            raise ConfigError(f"study.liars={self.liars} of {self.clients} clients: some must lie and some not")
        for name, known in (("rules", tuple(RULES)), ("attacks", tuple(self._attacks()))):
            if odd := [word for word in getattr(self, name) if word not in known]:
                raise ConfigError(f"study.{name} holds {odd[0]!r}: use some of {', '.join(known)}")
        small: dict[str, Any] = {"seeds": 1, "rounds": min(2, self.rounds), "rules": self.rules[:2]}
        sized = replace(self, **small, attacks=self.attacks[-1:]) if self.tiny else self
        return sized._outcome(bench)

    def _attacks(self) -> dict[str, Attack]:
        return {
            FLIP: SignFlip(self.scale),
            NOISE: Noise(self.scale),
            REPLACED: Replacement(self.clients / self.liars),
            BACKDOOR: Backdoor(scale=self.stretch),
        }

    def options(self, rule: str, seed: int, bench: Bench) -> tuple[str, ...]:
        """Of `fedssl pretrain`."""
        told = {
            "krum": (f"strategy.num_malicious_nodes={self.liars}",),
            "bulyan": (f"strategy.num_malicious_nodes={self.liars}",),
            "trimmed mean": (f"strategy.beta={self.liars / self.clients + 1e-6}",),
            "bounded": (f"aggregation.norm={self._length(seed, bench):.4g}",) if rule == "bounded" else (),
        }
        return (
            "data=digits", "device=cpu", "evaluate.final=false", "evaluate.every=0", f"seed={seed}",
            f"checkpoint_every={self.rounds}", f"federation.clients={self.clients}",
            f"federation.rounds={self.rounds}", f"local.batch_size={self.batch_size}", f"local.lr={self.lr}",
            "local.warmup=0", f"encoder.width={self.width}", f"encoder.dim={4 * self.width}",
            f"method.hidden={8 * self.width}", f"method.out={4 * self.width}",
            *partition(self.skew), *RULES[rule], *told.get(rule, ()),
        )  # fmt: skip

    def _length(self, seed: int, bench: Bench) -> float:
        """The bound: from honest clients under FedAvg."""
        rows = self._run("fedavg", HONEST, seed, bench).rows("clients.jsonl")
        return self.bound * statistics.median(row["drift"] for row in rows)

    def _run(self, rule: str, attack: str, seed: int, bench: Bench) -> RunDirectory:
        plan = config.compose([*self.options(rule, seed, bench), *bench.overrides])
        name = attack if attack == HONEST else f"{attack}-{self.liars}-{self.scale:g}-{self.stretch:g}"
        path = bench.folder / "runs" / f"{name}-{plan.path.name}".replace(" ", "-")
        if not (path / "summary.json").exists():
            bench.reporter.say(f"{rule}, {attack}, seed {seed}")
        return liars.run(plan, self._attacks().get(attack), range(self.liars), path)

    def _outcome(self, bench: Bench) -> Outcome:
        found: dict[Any, Mapping[str, Sequence[float]]] = {}
        for rule in self.rules:
            for attack in (HONEST, *self.attacks):
                runs = [self._run(rule, attack, seed, bench) for seed in range(self.seeds)]
                found[rule, attack] = columns([measured(Finished.of(run)) for run in runs])
        first = [self._run(self.rules[0], HONEST, seed, bench) for seed in range(self.seeds)]
        found[UNTRAINED, HONEST] = columns([measured(Finished.untrained(run)) for run in first])
        results = Results(found)
        findings = [self._harms(results, attack) for attack in self.attacks if attack != BACKDOOR]
        findings += [self._keeps(results, rule) for rule in self.rules if set(self.attacks) - {BACKDOOR}]
        findings += [self._shuts(results, rule) for rule in self.rules if BACKDOOR in self.attacks]
        rows = results.rows("attackers", lambda key: key[1], lambda key: key[0])
        return Outcome(rows, {"attackers": self._panels(results)}, findings)

    def _panels(self, results: Results) -> list[Panel]:
        names = (HONEST, *self.attacks)
        accuracy = {rule: results.bars({name: (rule, name) for name in names}, FIVE) for rule in self.rules}
        success = {rule: results.bars({name: (rule, name) for name in names}, SUCCESS) for rule in self.rules}
        untrained = results.interval((UNTRAINED, HONEST), FIVE).mean
        return [
            Panel("", f"accuracy, {FIVE}", bars=accuracy, levels={UNTRAINED: untrained}),
            Panel("", SUCCESS, bars=success),
        ]

    def _harms(self, results: Results, attack: str) -> Finding:
        """Whether a mean is hurt at all."""
        rule = self.rules[0]
        loss = results.gain((rule, HONEST), (rule, attack), FIVE)
        rank = [results.interval((rule, name), RANK).text(digits=1) for name in (attack, HONEST)]
        return Finding(
            f"{self.liars} of {self.clients} clients harm {rule} by {attack}",
            loss.above(0),
            f"{loss.text(100, 1)} points of accuracy ({FIVE}) are lost; rank of features {rank[0]} beside {rank[1]}",
        )

    def _keeps(self, results: Results, rule: str) -> Finding:
        """Whether a rule loses no more than the margin, under any poisoning."""
        attacks = [name for name in self.attacks if name != BACKDOOR]
        gains = {name: results.gain((rule, name), (self.rules[0], HONEST), FIVE) for name in attacks}
        alone = results.gain((rule, HONEST), (self.rules[0], HONEST), FIVE)
        said = "; ".join(f"{name} {gain.text(100, 1, sign=True)}" for name, gain in gains.items())
        return Finding(
            f"{rule} keeps what {self.rules[0]} reaches without liars, within {100 * self.margin:g} points, under "
            "every poisoning",
            both([gain.above(-self.margin) for gain in gains.values()]),
            f"{said}; among honest clients {alone.text(100, 1, sign=True)}",
        )

    def _shuts(self, results: Results, rule: str) -> Finding:
        """Whether a rule leaves the trigger without an effect."""
        won = results.gain((rule, BACKDOOR), (rule, HONEST), SUCCESS)
        opened = won.above(self.margin)
        lost = results.gain((rule, HONEST), (rule, BACKDOOR), FIVE)
        return Finding(
            f"{rule} keeps the backdoor shut",
            None if opened is None else not opened,
            f"{results.interval((rule, BACKDOOR), SUCCESS).text(100, 1)} % of triggered examples are taken for the "
            f"chosen class, {results.interval((rule, HONEST), SUCCESS).text(100, 1)} % without liars; accuracy falls "
            f"by {lost.text(100, 1)} points",
        )


def measured(finished: Finished) -> dict[str, float]:
    """Accuracies, rank, and how often a linear probe takes test examples with the trigger for the liar's class."""
    probed, target = Probed.of(finished), Backdoor().target
    rows = np.flatnonzero(probed.held != target)
    marked = triggered(finished.data.test.batch(torch.from_numpy(rows)))
    with torch.inference_mode():
        features = finished.model["encoder"](finished.job.data.augment.plain(marked)).numpy()
    told = np.full(len(rows), target)
    success = probes.linear(probed.train, probed.labels, features, told, seed=probed.seed).accuracy
    sets = (probed.train, probed.labels, probed.test, probed.held)
    return {
        FIVE: probes.few_label(*sets, per_class=5, repeats=10, seed=probed.seed).mean,
        LINEAR: probes.linear(*sets, seed=probed.seed).accuracy,
        KNN: probes.knn(*sets),
        RANK: diagnostics.effective_rank(torch.from_numpy(probed.test)),
        SUCCESS: success,
    }
