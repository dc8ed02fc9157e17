"""Federations made to collapse, beside healthy twins: spectra over rounds, what saves them, which alarms ring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedssl.intervals import Interval, both
from fedssl.measures.alarms import COLLAPSES
from fedssl.report.charts import Line, Panel
from simulations.studies.base import Bench, Finding, Outcome
from simulations.studies.federated.collapsing import ALARM, RANK, SPREAD, STANDING, History, measured
from simulations.studies.federated.failures import BYOL, CASES, FAILURE, HEALTHY, IID, REMEDY, Case
from simulations.studies.federated.measures import FIVE, LINEAR
from simulations.studies.federated.results import Results, columns

PAIRS = (("SimSiam", "no stop-gradient"), ("FedBYOL", "target only"))  # healthy, collapsing: the spectra that are drawn
_MOST = 7  # cases in a panel, as many as there are colours


@dataclass(frozen=True)
class Collapse:
    """Failures by families of methods, each held against its healthy twin of the same seed, and remedies.

    A federation counts as collapsed where its projections have less than `threshold` of the twin's effective rank.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, each with its own split and weights; 1 or more, intervals need 2.
        families: of `failures.CASES`.
        clients: of all runs but those with one class a client.
        classes: a client.
        rounds: of all runs.
        every: rounds between measurements; a divisor of `rounds`, so that the end is measured.
        epochs: of local training.
        lr: high, so that as few steps lead far.
        batch_size: small, so that clients take many steps.
        decay: of BYOL's teacher, whose window 1 / (1 - m) should be a small part of a client's steps.
        threshold: share of the twin's rank.
    """

    tiny: bool = False
    seeds: int = 3
    families: tuple[str, ...] = ("SimSiam", "FedBYOL", "VICReg", "SimCLR", "BYOL, IID")
    clients: int = 5
    classes: int = 2
    rounds: int = 16
    every: int = 2
    epochs: int = 1
    lr: float = 0.005
    batch_size: int = 32
    decay: float = 0.97
    threshold: float = 0.5

    def run(self, bench: Bench) -> Outcome:
        """Run and measure every case."""
        small: dict[str, Any] = {"seeds": min(2, self.seeds), "rounds": min(4, self.rounds)}
        sized = replace(self, families=self.families[:1], **small) if self.tiny else self
        return sized._outcome(bench)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """Those of the chosen families, by name."""
        return {name: case for name, case in CASES.items() if case.family in self.families}

    def options(self, case: Case) -> tuple[str, ...]:
        """Of a case's runs; its own come last and win."""
        decay = (f"method.decay={self.decay}", "method.decay_schedule=constant")
        skewed = ("partition=pathological", f"partition.classes_per_client={self.classes}")
        return (
            "data=digits", "device=cpu", "evaluate.final=false", f"evaluate.every={self.every}", "evaluate.clients=2",
            "evaluate.examples=500", f"checkpoint_every={self.rounds}", f"federation.clients={self.clients}",
            f"federation.rounds={self.rounds}", f"local.epochs={self.epochs}", f"local.batch_size={self.batch_size}",
            f"local.lr={self.lr}", "local.warmup=0", *(() if IID in case.options else skewed),
            *(decay if BYOL in case.options else ()), *case.options,
        )  # fmt: skip

    def _outcome(self, bench: Bench) -> Outcome:
        runs = {
            name: [bench.pretrain(*self.options(case), f"seed={seed}") for seed in range(self.seeds)]
            for name, case in self.cases.items()
        }
        results = Results({name: columns([measured(run) for run in each]) for name, each in runs.items()})
        histories = {name: [History.of(run) for run in each] for name, each in runs.items()}
        charts = {"collapse": self._spectra(histories), "families": self._families(results, histories)}
        findings = [self._collapses(results, name) for name in self._named(FAILURE)]
        findings += [self._saves(results, name) for name in self._named(REMEDY)]
        findings.append(self._alarms(results))
        rows = results.rows("collapse", lambda name: self.cases[name].family, str)
        shown = [row for row in rows if row["mean"] or not row["measure"].startswith("alarm")]
        return Outcome(shown, charts, findings)

    def _named(self, kind: str) -> list[str]:
        return [name for name, case in self.cases.items() if case.kind == kind]

    def _share(self, results: Results, name: str, of: str) -> Interval:
        """The logarithm of one's rank over another's, paired by seed."""
        pairs = zip(results.values[name][RANK], results.values[of][RANK], strict=True)
        return Interval.of([math.log(a / b) for a, b in pairs])

    def _spectra(self, histories: Mapping[str, Sequence[History]]) -> list[Sequence[Panel]]:
        """Healthy beside collapsing: spectra of the first seed at some rounds, and ranks by round."""
        pairs = [pair for pair in PAIRS if set(pair) <= histories.keys()]
        rows: list[Sequence[Panel]] = [
            [
                Panel("index of the eigenvalue", "eigenvalue / length²", histories[name][0].curves(), log_y=True,
                      shaded=True, title=title)
                for name, title in ((healthy, healthy), (failing, f"{healthy}, {failing}"))
            ]
            for healthy, failing in pairs
        ]  # fmt: skip
        return [*rows, [self._ranks(pair[0], {name: histories[name] for name in pair}) for pair in pairs]]

    def _ranks(self, title: str, histories: Mapping[str, Sequence[History]]) -> Panel:
        lines = {}
        for name, each in histories.items():
            found = [Interval.of(values).bar for values in zip(*(history.ranks for history in each), strict=True)]
            lines[name] = Line(list(each[0].rounds), [mean for mean, _ in found], [half for _, half in found])
        return Panel("communication round", RANK, lines, title=title)

    def _families(self, results: Results, histories: Mapping[str, Sequence[History]]) -> list[Sequence[Panel]]:
        """Every case by family: ranks by round, and accuracies at the end."""
        rows: list[Sequence[Panel]] = []
        for family in self.families:
            of = {name: case for name, case in self.cases.items() if case.family == family}
            saved = [name for name, case in of.items() if case.kind == REMEDY]
            failing = [name for name in of if name not in saved]
            fails = [name for name in failing if name == family or name in {of[each].twin for each in saved}]
            for names in [list(of)] if len(of) <= _MOST else [failing, [*fails, *saved]]:
                bars = {
                    name: {measure: results.interval(name, measure).bar for measure in (FIVE, LINEAR)} for name in names
                }
                ranks = self._ranks(family, {name: histories[name] for name in names})
                rows.append([ranks, Panel("", "accuracy", bars=bars, title="at the end")])
        return rows

    def _collapses(self, results: Results, name: str) -> Finding:
        case = self.cases[name]
        above = self._share(results, name, case.twin).above(math.log(self.threshold))
        holds = above if case.survives else None if above is None else not above
        label = f"{case.fact}, " if case.fact else ""
        return Finding(
            f"{label}{case.family}, {name}: {'does not collapse' if case.survives else 'collapses'}",
            holds,
            f"{self._beside(results, name, case.twin)}; collapse means below {100 * self.threshold:.0f} % of the rank, "
            "decided where the 95 % interval of the ratio leaves that out; alarms: "
            + (", ".join(self._rung(results, name)) or "none"),
        )

    def _saves(self, results: Results, name: str) -> Finding:
        case = self.cases[name]
        healthy, five = (results.interval(case.family, measure) for measure in (RANK, FIVE))
        grown = [self._share(results, name, case.twin).above(0), results.gain(name, case.twin, FIVE).above(0)]
        return Finding(
            f"{case.family}, {name}: saves what fails as {case.twin!r}",
            both(grown),
            f"{self._beside(results, name, case.twin)}; {case.family} itself has {healthy.text(digits=1)} and "
            f"{five.text(100, 1)} %; holds means that rank and accuracy grow, decided where both 95 % intervals leave "
            "out no change",
        )

    def _beside(self, results: Results, name: str, twin: str) -> str:
        """Two cases in numbers."""
        rank, other = (results.interval(which, RANK).text(digits=1) for which in (name, twin))
        spread, wide = (results.interval(which, SPREAD).text(digits=2) for which in (name, twin))
        five, gain = results.interval(name, FIVE), results.gain(name, twin, FIVE)
        return (
            f"the projections' rank is {rank} against {other} of {twin}, {_percent(self._share(results, name, twin))}, "
            f"their spread {spread} against {wide}; 5 labels a class give {five.text(100, 1)} %, "
            f"{gain.text(100, 1, sign=True)} points"
        )

    def _rung(self, results: Results, name: str, prefix: str = ALARM) -> list[str]:
        """The alarms that were raised, with the number of seeds where it is not all of them."""
        found = []
        for measure, values in results.values[name].items():
            if measure.startswith(prefix) and sum(values):
                count = "" if all(values) else f" ({sum(values):.0f} of {len(values)} seeds)"
                found.append(measure.removeprefix(prefix) + count)
        return found

    def _alarms(self, results: Results) -> Finding:
        """Whether the monitor tells the collapsed from the healthy."""

        def standing(name: str, seed: int) -> bool:
            return any(results.values[name][f"{STANDING}{alarm}"][seed] for alarm in COLLAPSES)

        each = range(self.seeds)
        limit = math.log(self.threshold)
        down = [name for name in self._named(FAILURE) if self._share(results, name, self.cases[name].twin).mean < limit]
        well = self._named(HEALTHY)
        hits, false = ({n: sum(standing(n, seed) for seed in each) for n in names} for names in (down, well))
        missed = [f"{name} ({count} of {self.seeds})" for name, count in hits.items() if count < self.seeds]
        return Finding(
            "when a run ends, an alarm of collapse stands for what has collapsed and for nothing healthy",
            None if not down else not missed and not sum(false.values()),
            f"it stands in {sum(hits.values())} of {len(down) * self.seeds} runs that have collapsed by the rank of "
            f"their projections, and in {sum(false.values())} of {len(well) * self.seeds} healthy ones"
            + (f"; not in all seeds: {', '.join(missed)}" if missed else ""),
        )


def _percent(share: Interval) -> str:
    """A ratio of ranks, known by its logarithm, with the ends of its interval."""
    if not math.isfinite(share.half):
        return f"{100 * math.exp(share.mean):.0f} %"
    low, high = (100 * math.exp(share.mean + sign * share.half) for sign in (-1, 1))
    return f"{100 * math.exp(share.mean):.0f} % ({low:.0f} to {high:.0f} %)"
