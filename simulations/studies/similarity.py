"""Cosine or dot product (T6): radial gradients and the lengths of what is compared, over training and federation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedssl.report.charts import Panel
from fedssl.rundir import RunDirectory
from fedssl.theory import log_log_slope
from simulations.studies.base import Bench, Finding, Outcome, check, mean_and_deviation
from simulations.studies.tools.rows import Stat, apart, joined, line, pair, row, stats
from simulations.studies.tools.runs import Finished, by_round
from simulations.studies.tools.sweeps import Sweep, places
from simulations.studies.tools.watched import free_descent

METHODS = {"SimCLR": "simclr", "SimSiam": "simsiam"}
SIMILARITIES = ("cosine", "dot")
FIRST, LAST = "mean |z|, first round", "mean |z|, last round"
RADIAL, ACCURACY = "size of the radial cosine", "accuracy, 5 labels a class"
TIME = 3.0  # rate times steps of the embeddings without a network


@dataclass(frozen=True)
class Similarity:
    """Embeddings alone, then SimCLR and SimSiam on digits, with either similarity.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions.
        rounds: of the runs.
        clients, alpha: of the federated runs, Dir(alpha) by label.
        rates: of gradient descent on embeddings without a network.
        temperature: of SimCLR and of those embeddings.
    """

    tiny: bool = False
    seeds: int = 3
    rounds: int = 15
    clients: int = 10
    alpha: float = 0.1
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    temperature: float = 0.5

    def __post_init__(self) -> None:
        check(self)

    def run(self, bench: Bench) -> Outcome:
        """Measure both."""
        small = replace(self, seeds=1, rounds=min(self.rounds, 4), clients=min(self.clients, 5)) if self.tiny else self
        return joined([small._alone(), small._runs(bench)])

    def _alone(self) -> Outcome:
        """Growth of |z| in a fixed time, against the step size: what is left for infinitesimal steps."""
        growth: dict[str, list[Stat]] = {}
        second: dict[str, list[float]] = {}
        for similarity in SIMILARITIES:
            found = [
                [free_descent(similarity, rate, TIME, self.temperature, seed) for seed in range(self.seeds)]
                for rate in self.rates
            ]
            growth[similarity] = [mean_and_deviation([g for g, _ in each]) for each in found]
            second[similarity] = [mean_and_deviation([s for _, s in each])[0] for each in found]
        rows = [
            row("embeddings alone", "central", f"{s}, rate {rate:g}", "log growth of |z|", stat)
            for s in SIMILARITIES
            for rate, stat in zip(self.rates, growth[s], strict=True)
        ]
        panel = Panel(
            f"step size (time {TIME:g} = steps x size)",
            "log growth of |z|",
            {s: line(self.rates, growth[s]) for s in SIMILARITIES},
            log_x=True,
            log_y=True,
        )
        slope = {s: log_log_slope(self.rates, [max(mean, 1e-12) for mean, _ in growth[s]]) for s in SIMILARITIES}
        finding = Finding(
            "T6: with cosine an infinitesimal step keeps |z|, with dot it does not",
            abs(slope["cosine"] - 1) < 0.15 and growth["dot"][0][0] > 10 * growth["cosine"][0][0],
            f"in equal time log |z| grows like rate^{slope['cosine']:.2f} with cosine, to {growth['cosine'][0][0]:.4f} "
            f"at rate {self.rates[0]:g}, and like rate^{slope['dot']:.2f} with dot, to {growth['dot'][0][0]:.3f}; all "
            f"of cosine's growth is of second order (share {second['cosine'][0]:.6f}), of dot's "
            f"{second['dot'][0]:.3f}; holds means an exponent within 0.15 of 1 and ten times the growth with dot",
        )
        return Outcome(rows, {"embeddings_alone": [panel]}, [finding])

    def _runs(self, bench: Bench) -> Outcome:
        """Both methods with both similarities, centrally and federated, watched."""
        where = places(self.clients, self.alpha)
        del where["IID clients"]
        settings = {
            f"{name}, {similarity}": (
                *(f"method={method}", f"method.similarity={similarity}"),
                f"method._target_=simulations.studies.tools.watched.Watched{name}",
                *((f"method.temperature={self.temperature}",) if method == "simclr" else ()),
            )
            for name, method in METHODS.items()
            for similarity in SIMILARITIES
        }
        sweep = Sweep.of(bench, where, settings, (f"federation.rounds={self.rounds}",), self.seeds, _measure)
        charts = {
            "lengths": [_lengths(sweep, name) for name in METHODS],
            "radial_and_probes": [
                Panel("", "mean |cos(z, dL/dz)|", bars=sweep.bars(RADIAL), log_y=True),
                Panel("", ACCURACY, bars=sweep.bars(ACCURACY)),
            ],
        }
        findings = [_orthogonal(sweep)]
        for say in (_runaway, _better):
            findings += [say(sweep, name, place) for name in METHODS for place in sweep.places]
        return Outcome(sweep.rows("digits"), charts, findings)


def _measure(run: RunDirectory) -> dict[str, float]:
    lengths = by_round(run, "length")
    return {
        FIRST: lengths[0],
        LAST: lengths[-1],
        RADIAL: float(np.mean(by_round(run, "radial_size"))),
        ACCURACY: Finished.of(run).few_label(),
    }


def _lengths(sweep: Sweep, name: str) -> Panel:
    lines = {}
    for similarity in SIMILARITIES:
        for place in sweep.places:
            found = stats([by_round(run, "length") for run in sweep.runs[place, f"{name}, {similarity}"]])
            lines[f"{similarity}, {place}"] = line(range(1, len(found) + 1), found)
    vectors = "projections" if name == "SimCLR" else "predictions"
    return Panel("round", f"mean |z| of the {vectors}", lines, title=f"{name}, its {vectors}")


def _orthogonal(sweep: Sweep) -> Finding:
    cosine, dot = (
        [sweep.mean(place, f"{name}, {similarity}", RADIAL) for place in sweep.places for name in METHODS]
        for similarity in SIMILARITIES
    )
    return Finding(
        "T6: dL/dz is orthogonal to z with cosine and not with dot, central and federated",
        max(cosine) < 1e-5 < 1e-2 < min(dot),
        f"the mean |cos(z, dL/dz)| of float32 training is at most {max(cosine):.1e} with cosine and at least "
        f"{min(dot):.2f} with dot; holds means below 1e-5 and above 0.01",
    )


def _runaway(sweep: Sweep, name: str, place: str) -> Finding:
    cosine, dot = (
        sweep.mean(place, setting, LAST) / sweep.mean(place, setting, FIRST)
        for setting in (f"{name}, {similarity}" for similarity in SIMILARITIES)
    )
    return Finding(
        f"T6: with dot lengths run away, {name}, {place}",
        dot > 2 * cosine,
        f"from the first to the last round mean |z| changes by the factor {dot:.2f} with dot and {cosine:.2f} with "
        "cosine (weights move all z at once, so cosine does not keep it either); holds means twice the factor",
    )


def _better(sweep: Sweep, name: str, place: str) -> Finding:
    cosine, dot = (sweep.stat(place, f"{name}, {similarity}", ACCURACY) for similarity in SIMILARITIES)
    return Finding(
        f"T6: {name} learns better with cosine than with dot, {place}",
        apart(cosine, dot),
        f"5 labels a class give {pair(cosine)} with cosine and {pair(dot)} with dot; decided where the difference is "
        "larger than both deviations",
    )
