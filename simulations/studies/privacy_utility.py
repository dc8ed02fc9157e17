"""What privacy costs in features: mechanisms by epsilon, skew and a public start, beside floors and audits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedssl import config, probes
from fedssl.diagnostics import effective_rank
from fedssl.errors import ConfigError
from fedssl.intervals import both
from fedssl.job.setup import initial_model
from fedssl.report.charts import Line, Panel
from fedssl.rundir import RunDirectory
from simulations.studies.base import Bench, Finding, Outcome
from simulations.studies.federated.cells import partition
from simulations.studies.federated.measures import FIVE, KNN, RANK, Probed
from simulations.studies.federated.mechanisms import MECHANISMS, lower_bound, public
from simulations.studies.federated.results import Results, columns
from simulations.studies.tools.runs import CENTRAL, Finished

RAW, UNTRAINED, START = "raw pixels", "untrained encoder", "public start"
SPENT, AUDITED = "epsilon, accounted", "epsilon, audited"
SMALL = ("device=cpu", "evaluate.every=0", "evaluate.final=false", "encoder.width=8", "encoder.dim=32",
         "method.hidden=32", "method.out=16", "local.warmup=0")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One federation of the design; epsilon None is without privacy."""

    mechanism: str
    epsilon: float | None
    skew: str
    begun: bool  # with the public start

    @property
    def floor(self) -> str:
        """What it begins with, so what its training has to beat."""
        return START if self.begun else UNTRAINED


@dataclass(frozen=True)
class PrivacyUtility:
    """Every mechanism by epsilon with and without a public start; on other skews at one epsilon, with the start.

    Args:
        tiny: everything smaller, the whole in under half a minute.
        seeds: repetitions, each with its own split, weights, start and probes; 1 or more, intervals need 2.
        mechanisms: see `federated.mechanisms`; each is compared with its own method without privacy.
        epsilons: of each run, at delta 1e-5 for records and 1e-3 for clients.
        skews: the first meets every epsilon; see `cells.partition`.
        middle: the epsilon of the other skews.
        clients: that hold the records, where a record is the unit.
        many: clients, where a client is the unit; half of them are expected in a round.
        rounds, epochs, lr: of all federations.
        batch_size: expected, where a record is the unit: large, because noise is divided by it.
        public_rounds: of SimCLR on the public images, by which the start is trained.
    """

    tiny: bool = False
    seeds: int = 3
    mechanisms: tuple[str, ...] = tuple(MECHANISMS)
    epsilons: tuple[float, ...] = (2.0, 8.0, 32.0)
    skews: tuple[str, ...] = ("iid", "dirichlet 0.3")
    middle: float = 8.0
    clients: int = 5
    many: int = 300
    rounds: int = 4
    epochs: int = 1
    lr: float = 0.005
    batch_size: int = 125
    public_rounds: int = 8

    def run(self, bench: Bench) -> Outcome:
        """Measure every setting, the floors and the audits."""
        if odd := [name for name in self.mechanisms if name not in MECHANISMS]:
            raise ConfigError(f"study.mechanisms names {odd[0]!r}: use some of {'; '.join(MECHANISMS)}")
        sized = self._small() if self.tiny else self
        return sized._outcome(bench)

    def _small(self) -> PrivacyUtility:
        few: dict[str, Any] = {"mechanisms": self.mechanisms[:1] + self.mechanisms[3:4], "skews": self.skews[:1]}
        return replace(self, **few, seeds=1, epsilons=(self.middle,), many=40, rounds=1, public_rounds=1)

    @property
    def settings(self) -> list[Setting]:
        """The design."""
        epsilons = (None, *self.epsilons)
        found = [Setting(*words) for words in product(self.mechanisms, epsilons, self.skews[:1], (False, True))]
        few = product(self.mechanisms, (None, self.middle), self.skews[1:], (True,))
        return found + [Setting(*words) for words in few]

    def options(self, setting: Setting, start: Path | None) -> tuple[str, ...]:
        """Of a setting's runs."""
        mechanism = MECHANISMS[setting.mechanism]
        skew = partition(setting.skew)
        if mechanism.unit == "client":  # few examples a client, so none may go without
            equal = ("partition.sizes=equal",) if skew[0] == "partition=dirichlet" else ()
            who = (f"federation.clients={self.many}", "participation=poisson", "participation.fraction=0.5",
                   "local.batch_size=8", *equal)  # fmt: skip
        else:
            who = (f"federation.clients={self.clients}", f"local.batch_size={self.batch_size}")
        begun = (f"start={start}",) if setting.begun and start is not None else ()
        return (*SMALL, *mechanism.with_epsilon(setting.epsilon), *skew, *who, *begun, f"local.lr={self.lr}",
                f"local.epochs={self.epochs}", f"federation.rounds={self.rounds}",
                f"checkpoint_every={self.rounds}")  # fmt: skip

    def started(self, bench: Bench, seed: int) -> RunDirectory:
        """The public start: SimCLR on drawn shapes of the digits' size, by one party."""
        size = (f"federation.rounds={self.public_rounds}", f"checkpoint_every={self.public_rounds}")
        return bench.pretrain(*SMALL, *CENTRAL, *public("data"), "method=simclr", "method.norm=layer", *size,
                              "local.lr=0.003", "local.batch_size=128", f"seed={seed}")  # fmt: skip

    def _outcome(self, bench: Bench) -> Outcome:
        starts = [self.started(bench, seed).path for seed in range(self.seeds)]
        values: dict[Any, dict[str, list[float]]] = {}
        for setting in self.settings:
            each = [(*self.options(setting, start), f"seed={seed}") for seed, start in enumerate(starts)]
            values[setting] = columns([self._measured(bench.pretrain(*options)) for options in each])
            if setting.epsilon is not None and not setting.begun and setting.skew == self.skews[0]:
                canaries = 200 if self.tiny else 1000
                found = [lower_bound((*o, *bench.overrides), seed, canaries) for seed, o in enumerate(each)]
                if bounds := [value for value in found if value is not None]:
                    values[setting][AUDITED] = bounds
        first = Setting(self.mechanisms[0], None, self.skews[0], True)
        each = [(*self.options(first, start), *bench.overrides, f"seed={seed}") for seed, start in enumerate(starts)]
        floors = [self._floors(options) for options in each]
        results = Results(values | {name: columns([each[name] for each in floors]) for name in (RAW, UNTRAINED, START)})
        rows = results.rows("privacy", _place, _setting)
        return Outcome(rows, self._charts(results), self._findings(results))

    def _probed(self, probed: Probed) -> dict[str, float]:
        """The cheaper ones of the probes, because there are many runs."""
        sets = (probed.train, probed.labels, probed.test, probed.held)
        few = probes.few_label(*sets, per_class=5, repeats=2 if self.tiny else 10, seed=probed.seed)
        return {FIVE: few.mean, KNN: probes.knn(*sets), RANK: effective_rank(torch.from_numpy(probed.test))}

    def _measured(self, run: RunDirectory) -> dict[str, float]:
        """Probes of a run's encoder, and what it has spent."""
        spent = run.read("summary.json")["epsilon"]
        return self._probed(Probed.of(Finished.of(run))) | ({} if spent is None else {SPENT: float(spent)})

    def _floors(self, options: Sequence[str]) -> dict[str, dict[str, float]]:
        """The same probes of pixels, of the seeded encoder and of the one that the run begins with."""
        job, bare = (config.compose([*options, *more]).job for more in ((), ("start=null",)))
        data = job.data.load()
        seeded, begun = (Finished(each, initial_model(each, data.train.shape).eval(), data) for each in (bare, job))
        both_parts = [(part, torch.arange(len(part))) for part in (data.train, data.test)]
        flat = [job.data.augment.plain(part.batch(rows)).flatten(1).numpy() for part, rows in both_parts]
        probed = {UNTRAINED: Probed.of(seeded), START: Probed.of(begun)}
        probed[RAW] = replace(probed[START], train=flat[0], test=flat[1])
        return {name: self._probed(each) for name, each in probed.items()}

    def _charts(self, results: Results) -> dict[str, Sequence[Panel]]:
        """Accuracy over epsilon, and the accounted beside the audited one."""
        last = 4 * max(self.epsilons)  # where the runs without privacy stand, on a logarithmic axis

        def panel(begun: bool) -> Panel:
            lines = {}
            for name in self.mechanisms:
                keys: dict[float, Any] = {e: Setting(name, e, self.skews[0], begun) for e in self.epsilons}
                keys[last] = Setting(name, None, self.skews[0], begun)
                lines[name] = results.line(keys, FIVE)
            levels = {name: results.interval(name, FIVE).mean for name in (RAW, UNTRAINED, START)}
            title = f"{'with' if begun else 'without'} the public start"
            return Panel(f"epsilon ({last:g}: no privacy)", f"accuracy, {FIVE}", lines, levels=levels, log_x=True,
                         title=title)  # fmt: skip

        audits = {}
        for name in self.mechanisms:
            keys = {e: Setting(name, e, self.skews[0], False) for e in self.epsilons}
            if all(AUDITED in results.values[key] for key in keys.values()):
                audits[name] = results.line(keys, AUDITED)
        audits["accounted"] = Line(list(self.epsilons), list(self.epsilons))
        bounds = Panel("epsilon, accounted", "epsilon, at least", audits, log_x=True, title="audit by canaries")
        charts: dict[str, Sequence[Panel]] = {"accuracy": [[panel(False), panel(True)]], "audit": [bounds]}  # type: ignore[dict-item,list-item]
        if len(self.skews) > 1:
            bars = {
                skew: results.bars({n: Setting(n, self.middle, skew, True) for n in self.mechanisms}, FIVE)
                for skew in self.skews
            }
            levels, title = (
                {START: results.interval(START, FIVE).mean},
                f"epsilon {self.middle:g}, with the public start",
            )
            charts["skew"] = [Panel("", f"accuracy, {FIVE}", bars=bars, levels=levels, title=title)]
        return charts

    def _findings(self, results: Results) -> list[Finding]:
        """Each mechanism against what it began with, against no privacy and against pixels; the start; the audits."""
        found: list[Finding] = []
        skew = self.skews[0]
        for name, begun in product(self.mechanisms, (False, True)):
            keys = [Setting(name, e, skew, begun) for e in (*self.epsilons, None)]
            gains = [results.gain(key, key.floor, FIVE) for key in keys]
            texts = [f"{_epsilon(k)}: {g.text(100, 1, True)}" for k, g in zip(keys, gains, strict=True)]
            top = max((k for k in keys if k.epsilon is not None), key=lambda k: k.epsilon or 0)
            said = f"{name}: private training beats the {keys[0].floor} that it began with, at epsilon {top.epsilon:g}"
            found.append(Finding(said, gains[-2].above(0), f"points of accuracy, {FIVE}, {'; '.join(texts)}"))
        for name in self.mechanisms:
            key = Setting(name, self.middle, skew, True)
            gain = results.gain(key, RAW, FIVE)
            said = f"{name}: epsilon {self.middle:g} with the public start beats raw pixels"
            found.append(Finding(said, gain.above(0), f"{gain.text(100, 1, True)} points"))
            cost = results.gain(replace(key, begun=False), replace(key, begun=False, epsilon=None), FIVE)
            said = f"{name}: privacy costs accuracy, at epsilon {self.middle:g} without a start"
            found.append(Finding(said, None if (lower := cost.above(0)) is None else not lower,
                                 f"{cost.text(100, 1, True)} points against the same method without"))  # fmt: skip
            helped = results.gain(key, replace(key, begun=False), FIVE)
            said = f"{name}: at epsilon {self.middle:g} a public start helps"
            found.append(Finding(said, helped.above(0), f"{helped.text(100, 1, True)} points"))
            for other in self.skews[1:]:
                change = results.gain(replace(key, skew=other), key, FIVE)
                said = f"{name}: {other} costs accuracy against {skew}, at epsilon {self.middle:g} with the start"
                found.append(Finding(said, None if (lower := change.above(0)) is None else not lower,
                                     f"{change.text(100, 1, True)} points"))  # fmt: skip
        return [*found, self._audit(results)]

    def _audit(self, results: Results) -> Finding:
        audited = {key: each[AUDITED] for key, each in results.values.items() if AUDITED in each}
        below = [max(bounds) <= key.epsilon for key, bounds in audited.items()]
        shown = [f"{k.mechanism}, {k.epsilon:g}: {np.mean(v):.2f}" for k, v in audited.items()]
        said = "No audit finds more than what is accounted for"
        return Finding(said, both(below) if below else None, f"{len(below)} audited, at least: {'; '.join(shown)}")


def _epsilon(key: Setting) -> str:
    return "no privacy" if key.epsilon is None else f"epsilon {key.epsilon:g}"


def _place(key: Any) -> str:
    return f"{key.skew}, {'public start' if key.begun else 'no start'}" if isinstance(key, Setting) else "floor"


def _setting(key: Any) -> str:
    return f"{key.mechanism}, {_epsilon(key)}" if isinstance(key, Setting) else str(key)
