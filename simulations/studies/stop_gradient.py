"""T8: what stop-gradient does to collapse, in the linear model and in SimSiam on digits, alone and averaged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedssl.report.charts import Panel
from fedssl.rundir import RunDirectory
from simulations.studies.base import Bench, Finding, Outcome, check
from simulations.studies.tools.rows import Stat, apart, joined, pair, row
from simulations.studies.tools.runs import CENTRAL, Finished
from simulations.studies.tools.scalar import Averaging, jacobian
from simulations.studies.tools.sweeps import Sweep, places, quality, untrained

BOTH = "stop-gradient and predictor"
SETTINGS = {
    BOTH: (),
    "stop-gradient alone": ("method.predictor=false",),
    "predictor alone": ("method.stop_gradient=false",),
    "neither": ("method.stop_gradient=false", "method.predictor=false"),
}
RANK, SPREAD = "effective rank of projections", "spread of projections"
ACCURACY = "accuracy, 5 labels a class"


@dataclass(frozen=True)
class StopGradient:
    """The linear model by its Jacobian and by simulation; then SimSiam with and without each of its two devices.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions of the runs on digits, 1 or more.
        noise: s of the linear model's augmentation, whose signal is 1.
        noises: s of the clients that average.
        points: predictors at which the linear model is simulated.
        starts: of the linear model's basins.
        clients: of the runs on digits.
        alpha: label skew of the runs, Dir(alpha).
        rounds: of the runs.
    """

    tiny: bool = False
    seeds: int = 3
    noise: float = 0.5
    noises: tuple[float, ...] = (0.0, 0.5, 1.5, 3.0)
    points: int = 10
    starts: int = 100
    clients: int = 5
    alpha: float = 0.1
    rounds: int = 15

    def __post_init__(self) -> None:
        check(self, zero=("noise", "noises"))

    def run(self, bench: Bench) -> Outcome:
        """Measure both parts."""
        small: dict[str, Any] = {"seeds": 1, "points": 5, "starts": 20, "rounds": min(4, self.rounds)}
        sized = replace(self, **small) if self.tiny else self
        bench.reporter.say("T8: the linear model")
        averaging = Averaging(sized.noises)
        linear = [jacobian(sized.noise, sized.points), averaging.rates(), averaging.basins(sized.starts)]
        return joined([*linear, sized._network(bench)])

    def _network(self, bench: Bench) -> Outcome:
        """SimSiam's ablations at three places."""
        common = ("method=simsiam", f"federation.rounds={self.rounds}")
        where = places(self.clients, self.alpha)
        # A client takes 1 / clients of the steps that one machine with all data takes: the fair comparison stops early.
        short = (*CENTRAL, f"federation.rounds={max(1, round(self.rounds / self.clients))}")
        where = {"central": where.pop("central"), "central, short": short, **where}
        sweep = Sweep.of(bench, where, SETTINGS, common, self.seeds, _measure)
        start = untrained(bench, common, self.seeds)
        panels = [
            Panel("", "effective rank", bars=sweep.bars(RANK), title="projections: directions in use, of 128"),
            Panel("", "std of a direction x sqrt(128)", bars=sweep.bars(SPREAD),
                  title="projections: 0 is collapse; short: a client's number of steps"),
            Panel("", "accuracy", bars=sweep.bars(ACCURACY), levels={"untrained encoder": start[ACCURACY][0]},
                  title="features: 5 labels a class"),
        ]  # fmt: skip
        findings = [_collapse(sweep, place) for place in sweep.places]
        findings += [_accuracy(sweep, place, start[ACCURACY]) for place in sweep.places]
        findings.append(_protection(sweep))
        rows = [row("digits", "before training", "untrained", name, found) for name, found in start.items()]
        return Outcome([*sweep.rows("digits"), *rows], {"digits": panels}, findings)


def _measure(run: RunDirectory) -> dict[str, float]:
    return {**quality(Finished.of(run)), "loss": run.rows()[-1]["loss"]}


def _collapse(sweep: Sweep, place: str) -> Finding:
    ranks = {setting: sweep.stat(place, setting, RANK) for setting in sweep.settings}
    others = {setting: found for setting, found in ranks.items() if setting != BOTH}
    worst = max(others, key=lambda setting: others[setting][0])
    loss = sweep.mean(place, "predictor alone", "loss")
    return Finding(
        f"T8, digits, {place}: projections collapse without stop-gradient, and without a predictor (p = 1)",
        all(ranks[BOTH][0] > 2 * found[0] for found in others.values()),
        f"effective rank of the projections {pair(ranks[BOTH], 1)} with both; "
        + ", ".join(f"{setting} {pair(found, 1)}" for setting, found in others.items())
        + f"; the loss without stop-gradient ends at {loss:.2f}, -1 is complete collapse or perfect agreement; holds "
        f"means that each of the three has less than half the rank with both; the highest is {worst}",
    )


def _accuracy(sweep: Sweep, place: str, start: Stat) -> Finding:
    both = sweep.stat(place, BOTH, ACCURACY)
    others = {s: sweep.stat(place, s, ACCURACY) for s in sweep.settings if s != BOTH}
    best = max(others, key=lambda setting: others[setting][0])
    return Finding(
        f"T8, digits, {place}: stop-gradient and predictor together give the best features",
        apart(both, others[best]),
        f"5 labels a class give {pair(both)} with both and at best {pair(others[best])} ({best}), {pair(start)} "
        f"before training; without stop-gradient {pair(others['predictor alone'])}; holds or does not hold means that "
        "the difference to the best is larger than both deviations together",
    )


def _protection(sweep: Sweep) -> Finding:
    alone, many, whole = (
        sweep.stat(place, "predictor alone", RANK) for place in ("central, short", "IID clients", "central")
    )
    both = [sweep.stat(place, BOTH, RANK) for place in ("central, short", "IID clients", "skewed clients")]
    return Finding(
        "T8 federated, digits: averaging clients slows the collapse that stop-gradient prevents",
        apart(many, alone),
        f"without stop-gradient the projections' rank is {pair(many, 1)} after averaging IID clients and "
        f"{pair(alone, 1)} centrally after as many steps as a client takes, {pair(whole, 1)} after as many passes over "
        f"the data; with both devices {pair(both[1], 1)} (IID), {pair(both[2], 1)} (skewed) and {pair(both[0], 1)}; "
        "decided where the difference of the first two is larger than both deviations",
    )
