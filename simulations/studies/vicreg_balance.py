"""T10: VICReg's three terms through training, with weights fixed, ill chosen, mended by advice, or adaptive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedssl.report.charts import Line, Panel
from fedssl.rundir import RunDirectory
from simulations.studies.base import Bench, Finding, Outcome, check
from simulations.studies.tools.rows import apart, joined, line, pair, row, stats
from simulations.studies.tools.runs import Finished, by_client, by_round
from simulations.studies.tools.sweeps import Sweep, places, quality, untrained

PAPER, STARVED, PUSHED, ADVISED, ADAPTIVE = "25, 25, 1", "25, 1, 1", "100, 1, 1", "100, 100, 2", "25, 1, 1 adaptive"
TERMS = {"invariance": "invariance", "variance": "variance hinge", "covariance": "covariance"}
ACCURACY, DEVIATION = "accuracy, 5 labels a class", "deviation of projections"
ACTED, HIGHEST = "share of rounds in which the rule acted", "largest weight of invariance"
TOGETHER = "share of rises of the hinge with a rise of invariance"


@dataclass(frozen=True)
class VicregBalance:
    """Weights of invariance, variance and covariance at three places, and a learning rate that shakes training.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, 1 or more.
        clients: of the federated runs.
        alpha: label skew, Dir(alpha).
        rounds: of all runs.
        rough: constant learning rate of the shaken runs, in which both symptoms of the rule can occur.
    """

    tiny: bool = False
    seeds: int = 3
    clients: int = 5
    alpha: float = 0.1
    rounds: int = 12
    rough: float = 0.05

    def __post_init__(self) -> None:
        check(self)

    def run(self, bench: Bench) -> Outcome:
        """Measure both parts."""
        small: dict[str, Any] = {"seeds": 1, "rounds": min(4, self.rounds)}
        sized = replace(self, **small) if self.tiny else self
        return joined([sized._weights(bench), sized._shaken(bench)])

    def _weights(self, bench: Bench) -> Outcome:
        """Five choices of weights at three places."""
        settings = {name: _weighed(name) for name in (PAPER, STARVED, PUSHED, ADVISED, ADAPTIVE)}
        where = places(self.clients, self.alpha)
        if self.tiny:
            del where["IID clients"]
        sweep = Sweep.of(bench, where, settings, self._common, self.seeds, _measure)
        start = untrained(bench, (*self._common, *settings[PAPER]), self.seeds)
        charts = {f"terms_{place.split()[0]}": _trajectories(sweep, place) for place in where}
        charts["quality"] = [
            Panel("", "accuracy", bars=sweep.bars(ACCURACY), levels={"untrained encoder": start[ACCURACY][0]},
                  title="5 labels a class; weights: invariance, variance, covariance"),
            Panel("", "effective rank", bars=sweep.bars("effective rank of features"),
                  title="features: directions in use, of 64"),
            Panel("", "mean deviation", bars=sweep.bars(DEVIATION), title="projections: the hinge asks for 1"),
        ]  # fmt: skip
        findings = [_provoked(sweep), _pushed(sweep), _advised(sweep), _controller(sweep), _symptoms(sweep)]
        rows = [row("weights", "before training", "untrained", name, found) for name, found in start.items()]
        return Outcome([*sweep.rows("weights"), *rows], charts, findings)

    def _shaken(self, bench: Bench) -> Outcome:
        """A learning rate at which training is thrown out of balance again and again."""
        settings = {f"{PAPER} {how}": (*_weighed(PAPER), f"method.balance={how}") for how in ("fixed", "adaptive")}
        where = places(self.clients, self.alpha)
        del where["IID clients"]
        common = (*self._common, "local.schedule=constant", f"local.lr={self.rough}")
        sweep = Sweep.of(bench, where, settings, common, self.seeds, _measure)
        lines = {
            f"{place}, seed {seed}": _curve([[max(clients) for clients in by_client(run, "invariance_weight")]])
            for place in where
            for seed, run in enumerate(sweep.runs[place, f"{PAPER} adaptive"])
        }
        weight = Panel(
            "communication round", "weight of invariance", lines, title="largest of the clients, round means"
        )
        panels = [Panel("", "accuracy", bars=sweep.bars(ACCURACY), title="features: 5 labels a class"), weight]
        findings = []
        for place in where:
            fixed, adaptive = (sweep.stat(place, setting, ACCURACY) for setting in settings)
            findings.append(
                Finding(
                    f"T10, {place}: where training is shaken (learning rate {self.rough:g}), adaptive weights help",
                    apart(adaptive, fixed),
                    f"5 labels a class give {pair(adaptive)} adaptive and {pair(fixed)} fixed; the rule acted in "
                    f"{100 * sweep.mean(place, f'{PAPER} adaptive', ACTED):.0f} % of the clients' rounds, and the "
                    f"largest mean weight in a round was {sweep.mean(place, f'{PAPER} adaptive', HIGHEST):.2f} "
                    "instead of 25; decided only where the difference is larger than both deviations",
                )
            )
        return Outcome(sweep.rows("shaken"), {"shaken": panels}, findings)

    @property
    def _common(self) -> tuple[str, ...]:
        every = f"evaluate.every={max(1, self.rounds // 6)}"
        return "method=vicreg", f"federation.rounds={self.rounds}", every, "evaluate.clients=0", "evaluate.examples=500"


def _weighed(name: str) -> tuple[str, ...]:
    """`25, 1, 1 adaptive` as options."""
    weights = [float(text) for text in name.removesuffix(" adaptive").split(",")]
    options = [f"method.{key}={value}" for key, value in zip(TERMS, weights, strict=True)]
    return (*options, "method.balance=adaptive") if "adaptive" in name else tuple(options)


def _measure(run: RunDirectory) -> dict[str, float]:
    """Quality, the terms of the last round, what the rule did, and whether its two symptoms come together."""
    finished = Finished.of(run)
    z = finished.features(finished.data.test, projected=True)
    found = {**quality(finished), DEVIATION: float(z.std(0, ddof=1).mean())}
    found |= {f"{label}, last round": by_round(run, term)[-1] for term, label in TERMS.items()}
    each = [by_client(run, term) for term in ("invariance", "variance")]
    rises = np.diff(each, axis=1) > 0  # (2, rounds - 1, clients)
    found[TOGETHER] = float(rises.all(0).sum() / max(1, rises[1].sum()))
    weights = [row["invariance_weight"] for row in run.rows("clients.jsonl") if "invariance_weight" in row]
    base = float(run.config()["method"]["invariance"])
    found[ACTED] = float(np.mean([w > 1.0001 * base for w in weights])) if weights else 0.0
    found[HIGHEST] = max(weights, default=base)
    return found


def _curve(runs: Sequence[Sequence[float]]) -> Line:
    """Mean and deviation over seeds, by round."""
    found = stats(runs)
    return line(range(1, len(found) + 1), found)


def _trajectories(sweep: Sweep, place: str) -> list[Panel]:
    """The three terms as clients report them, and the merged encoder's rank."""
    panels: list[Panel] = []
    for term, label in TERMS.items():
        lines = {s: _curve([by_round(run, term) for run in sweep.runs[place, s]]) for s in sweep.settings}
        title = "" if panels else f"{place}; weights: invariance, variance, covariance"
        panels.append(Panel("communication round", label, lines, log_y=term != "variance", title=title))
    lines = {}
    for setting in sweep.settings:
        rows = [[r for r in run.rows() if "effective_rank" in r] for run in sweep.runs[place, setting]]
        lines[setting] = line(
            [r["round"] for r in rows[0]], stats([[r["effective_rank"] for r in each] for each in rows])
        )
    panels.append(Panel("communication round", "effective rank of features", lines))
    return panels


def _each(sweep: Sweep, measure: str, *settings: str) -> str:
    """The measure of settings at every place, for a sentence."""
    return "; ".join(
        f"{place} " + ", ".join(f"{pair(sweep.stat(place, s, measure))} ({s})" for s in settings)
        for place in sweep.places
    )


def _decided(sweep: Sweep, better: str, worse: str) -> bool | None:
    """Whether the one is more accurate at every place, or at none; None where places differ or spread hides it."""
    found = [apart(sweep.stat(p, better, ACCURACY), sweep.stat(p, worse, ACCURACY)) for p in sweep.places]
    return True if all(f is True for f in found) else False if all(f is False for f in found) else None


DECIDED = "decided where the difference is larger than both deviations at every place"


def _provoked(sweep: Sweep) -> Finding:
    return Finding(
        "T10: a variance weight far below that of invariance brings collapse, central and federated",
        all(sweep.mean(p, STARVED, DEVIATION) < sweep.mean(p, PAPER, DEVIATION) / 3 for p in sweep.places),
        f"mean deviation of the projections, which the hinge wants at 1: {_each(sweep, DEVIATION, PAPER, STARVED)}; "
        "holds means that it falls below a third at every place",
    )


def _pushed(sweep: Sweep) -> Finding:
    return Finding(
        "T10: in incipient collapse, raise the weight of invariance (that alone)",
        _decided(sweep, PUSHED, STARVED),
        f"5 labels a class: {_each(sweep, ACCURACY, PUSHED, STARVED)}; {DECIDED}",
    )


def _advised(sweep: Sweep) -> Finding:
    return Finding(
        "T10: in incipient collapse, raise invariance, keep variance at least as high and covariance moderate",
        _decided(sweep, ADVISED, STARVED),
        f"5 labels a class: {_each(sweep, ACCURACY, ADVISED, STARVED, PAPER)}, the last of which raises variance "
        f"alone; {DECIDED}",
    )


def _controller(sweep: Sweep) -> Finding:
    same = [
        a == b
        for place in sweep.places
        for a, b in zip(sweep.values[place, ADAPTIVE][ACCURACY], sweep.values[place, PAPER][ACCURACY], strict=True)
    ]
    acted = max(sweep.mean(place, ADAPTIVE, ACTED) for place in sweep.places)
    return Finding(
        "T10: adaptive weights mend a starved variance",
        _decided(sweep, ADAPTIVE, STARVED),
        f"5 labels a class: {_each(sweep, ACCURACY, ADAPTIVE, STARVED)}; {sum(same)} of {len(same)} runs end exactly "
        "like fixed (25, 25, 1), which is the controller's floor, variance at least as high as invariance; the weight "
        f"of invariance was raised in at most {100 * acted:.0f} % of the rounds; {DECIDED}",
    )


def _symptoms(sweep: Sweep) -> Finding:
    shares = {place: sweep.mean(place, STARVED, TOGETHER) for place in sweep.places}
    ends = [sweep.mean(p, STARVED, "invariance, last round") / sweep.mean(p, PAPER, "invariance, last round")
            for p in sweep.places]  # fmt: skip
    return Finding(
        "T10: in incipient collapse invariance is high while the variance falls",
        all(share > 0.5 for share in shares.values()),
        "with starved variance, of the rounds in which a client's hinge rose its invariance term rose in "
        + ", ".join(f"{100 * share:.0f} % ({place})" for place, share in shares.items())
        + f", and it ends at {100 * min(ends):.1f} to {100 * max(ends):.1f} % of its value with (25, 25, 1): it is a "
        "squared distance that shrinks with the projections, so a rule that waits for both symptoms does not see "
        "collapse; holds means above half at every place",
    )
