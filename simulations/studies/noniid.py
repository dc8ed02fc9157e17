"""Federations that are not IID: methods, strategies, skews and numbers of clients, and what clients get from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedssl import config
from fedssl.report.charts import Panel
from simulations.studies.base import Bench, Outcome
from simulations.studies.federated.cells import Cell, cross, star
from simulations.studies.federated.facts import BOTH, EMA, ONLINE, SUPERVISED, UNTRAINED, Facts
from simulations.studies.federated.measures import (
    CKA,
    DRIFT,
    FIVE,
    GAP,
    LINEAR,
    MEAN,
    OWN_MEAN,
    OWN_WORST,
    WORST,
    Probed,
    measured,
)
from simulations.studies.federated.results import Results, columns
from simulations.studies.federated.supervised import HEAD, Baseline
from simulations.studies.tools.runs import Finished


@dataclass(frozen=True)
class NonIID:
    """A star around a reference federation, and a small cross of strategies by skews, beside supervised FedAvg.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, each with its own split, weights and probes; 1 or more, intervals need 2.
        method, strategy, skew, clients: of the reference, which every axis of the star leaves in one word.
        methods: axis of the star, and under the split `even` as well.
        strategies: axis of the star.
        skews: axis of the star and of the cross, see `cells.partition`.
        counts: axis of the star: numbers of clients.
        crossed: strategies that meet every skew.
        even: the split that is no skew.
        full: every combination of methods, strategies, skews and counts instead.
        rounds: of all runs.
        epochs: of local training.
        lr: high, so that as few steps lead far; not the baseline's.
        batch_size: small, so that clients take many steps.
        decay: of BYOL's teacher, whose window 1 / (1 - m) should be a small part of a client's steps.
        rates: learning rates of the supervised baseline, of which the best is taken; empty: no baseline.
    """

    tiny: bool = False
    seeds: int = 3
    method: str = "byol"
    strategy: str = "fedavg"
    skew: str = "2 classes"
    clients: int = 5
    methods: tuple[str, ...] = ("simclr", "byol", "simsiam", "vicreg")
    strategies: tuple[str, ...] = ("fedavg", "fedbyol", "fedu", "fedema", "ldawa", "fedvssl", "fedbn")
    skews: tuple[str, ...] = ("iid", "dirichlet 0.1", "2 classes", "1 class")
    counts: tuple[int, ...] = (5, 10, 20)
    crossed: tuple[str, ...] = (BOTH, ONLINE, EMA)
    even: str = "iid"
    full: bool = False
    rounds: int = 16
    epochs: int = 1
    lr: float = 0.005
    batch_size: int = 32
    decay: float = 0.97
    rates: tuple[float, ...] = (0.0005, 0.002, 0.008)

    def run(self, bench: Bench) -> Outcome:
        """Measure every cell, the baseline and the untrained encoder."""
        sized = self._small() if self.tiny else self
        return sized._outcome(bench)

    def _small(self) -> NonIID:
        few: dict[str, Any] = {name: getattr(self, name)[:1] for name in ("counts", "rates")}
        return replace(
            self,
            **few,
            seeds=1,
            methods=self.methods[:1],
            strategies=tuple(name for name in self.strategies if name in ("fedbyol", "fedbn")),
            skews=tuple(name for name in self.skews if name in (self.even, self.skew)),
            crossed=(BOTH, ONLINE),
            rounds=min(2, self.rounds),
        )

    @cached_property
    def centre(self) -> Cell:
        """The reference."""
        return Cell(self.method, self.strategy, self.skew, self.clients)

    @property
    def cells(self) -> list[Cell]:
        """The design."""
        if self.full:
            return cross(self.methods, self.strategies, self.skews, self.counts)
        found = star(self.centre, self.methods, self.strategies, self.skews, self.counts)
        found += cross(self.methods, (self.strategy,), (self.even,), (self.clients,))
        return list(dict.fromkeys(found + cross((self.method,), self.crossed, self.skews, (self.clients,))))

    def options(self, cell: Cell) -> tuple[str, ...]:
        """Of a cell's runs."""
        own = (f"method.decay={self.decay}", "method.decay_schedule=constant") if cell.method == "byol" else ()
        every = max(1, self.rounds // 4)
        return (
            "data=digits", "device=cpu", "evaluate.final=false", f"evaluate.every={every}",
            f"checkpoint_every={self.rounds}", *cell.options, *own, f"federation.rounds={self.rounds}",
            f"local.epochs={self.epochs}", f"local.lr={self.lr}", f"local.batch_size={self.batch_size}",
            "local.warmup=0",
        )  # fmt: skip

    def _outcome(self, bench: Bench) -> Outcome:
        found = Results.of(bench, self.cells, self.options, self.seeds, measured)
        runs = [bench.pretrain(*self.options(self.centre), f"seed={seed}") for seed in range(self.seeds)]
        start = columns([Probed.of(Finished.untrained(run)).accuracies() for run in runs])
        baseline = {skew: self._supervised(bench, skew) for skew in self.skews if self.rates}
        results = Results({**found.values, UNTRAINED: start, **{(SUPERVISED, s): v for s, v in baseline.items()}})
        return Outcome(
            results.rows("non-IID", _place, _setting),
            self._charts(results),
            Facts(results, self.centre, self.even).findings(self.methods, self.strategies, self.skews, self.counts),
        )

    def _supervised(self, bench: Bench, skew: str) -> dict[str, list[float]]:
        """The baseline on one split; the learning rate is chosen on the first seed and serves all."""
        bench.reporter.say(f"supervised FedAvg, {skew}")
        options = self.options(replace(self.centre, skew=skew, strategy=BOTH))
        plans = [config.compose([*options, *bench.overrides, f"seed={seed}"]) for seed in range(self.seeds)]
        each = [Baseline(plan.job, bench.folder / "supervised") for plan in plans]
        rate = each[0].best(self.rates)
        return columns([baseline.measured(rate) for baseline in each])

    def _charts(self, results: Results) -> dict[str, Sequence[Panel]]:
        """One an axis that has been walked."""
        axes = {
            "skews": (self.skews, self._skews),
            "strategies": (self.strategies, self._strategies),
            "methods": (self.methods, self._methods),
            "clients": (self.counts, self._clients),
        }
        return {name: draw(results) for name, (values, draw) in axes.items() if len(values) > 1}

    def _skews(self, results: Results) -> list[Panel]:
        """Strategies by skews with few labels, and beside the baseline with all of them."""
        levels = {name: results.interval(UNTRAINED, name).mean for name in (FIVE, LINEAR)}

        def bars(measure: str, names: Sequence[str]) -> dict[str, dict[str, tuple[float, float]]]:
            return {
                name: results.bars({s: replace(self.centre, strategy=name, skew=s) for s in self.skews}, measure)
                for name in names
            }

        heads = {
            f"{SUPERVISED} FedAvg, {what}": results.bars({s: (SUPERVISED, s) for s in self.skews}, measure)
            for what, measure in (("its own head", HEAD), ("a new probe", LINEAR))
        }
        few = Panel("", "accuracy", bars=bars(FIVE, self.crossed), levels={"untrained encoder": levels[FIVE]},
                    title=f"{self.method}: 5 labels a class")  # fmt: skip
        whole = Panel("", "accuracy", bars={**bars(LINEAR, self.crossed[:2]), **{k: v for k, v in heads.items() if v}},
                      levels={"untrained encoder": levels[LINEAR]}, title="all labels, linear")  # fmt: skip
        return [few, whole]

    def _strategies(self, results: Results) -> list[Panel]:
        keys = {name: replace(self.centre, strategy=name) for name in self.strategies}
        names = {FIVE: "everybody", MEAN: MEAN, WORST: WORST, OWN_MEAN: OWN_MEAN, OWN_WORST: OWN_WORST}
        bars = {name: results.bars(keys, measure) for measure, name in names.items()}
        return [
            Panel("", "accuracy", bars={name: values for name, values in bars.items() if values},
                  title=f"{self.method}, {self.centre.where}: 5 labels a class"),
            Panel("", "of 1", bars={name: results.bars(keys, name) for name in (CKA, GAP)},
                  title="clients before the merge, and what it gains"),
        ]  # fmt: skip

    def _methods(self, results: Results) -> list[Panel]:
        bars = {
            skew: results.bars({name: replace(self.centre, method=name, skew=skew) for name in self.methods}, FIVE)
            for skew in (self.even, self.skew)
        }
        return [Panel("", "accuracy", bars=bars, levels={"untrained encoder": results.interval(UNTRAINED, FIVE).mean},
                      title=f"{self.strategy}, {self.clients} clients: 5 labels a class")]  # fmt: skip

    def _clients(self, results: Results) -> list[Panel]:
        keys = {float(count): replace(self.centre, clients=count) for count in self.counts}
        lines = {name: results.line(keys, name) for name in (FIVE, MEAN, WORST)}
        inside = {name: results.line(keys, name) for name in (CKA, GAP)}
        return [
            Panel("clients", "accuracy", lines=lines, title=f"{self.centre.who}, {self.skew}: 5 labels a class"),
            Panel("clients", "of 1", lines=inside, title="clients before the merge, and what it gains"),
            Panel("clients", "distance in weights", lines={DRIFT: results.line(keys, DRIFT)}, title="a round's way"),
        ]


def _place(key: Any) -> str:
    return key.where if isinstance(key, Cell) else key[1] if isinstance(key, tuple) else "before training"


def _setting(key: Any) -> str:
    return key.who if isinstance(key, Cell) else SUPERVISED if isinstance(key, tuple) else str(key)
