"""The temperature (T7): what it does to scores, which one the rules choose, alone and for each client under skew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedssl.charts import Line, Panel
from fedssl.errors import ConfigError
from fedssl.temperature import TargetProbability
from fedssl.theory import for_target_probability, gradient_snr, max_snr, probability_moments
from simulations.studies.base import Bench, Finding, Outcome, mean_and_deviation
from simulations.studies.tools.rows import Row, Stat, joined, line, row
from simulations.studies.tools.runs import CENTRAL, QUICK, Finished, by_client
from simulations.studies.tools.scores import Scores

FLOORS = (0.0, 0.3, 1.0, 3.0)
GRID = tuple(float(t) for t in np.geomspace(0.02, 10.0, 25))
EVEN = "Dir(100)"
Accuracies = Mapping[tuple[str, float | str], Stat]  # by way and temperature


@dataclass(frozen=True)
class Temperature:
    """The gradient's signal-to-noise ratio on scores of a trained SimCLR, then runs on digits with and without rules.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions.
        rounds: of the runs.
        clients, alpha: of the federated runs, Dir(alpha) by label.
        fixed: temperatures of the sweep.
        probabilities: p* of the rules for a target probability.
    """

    tiny: bool = False
    seeds: int = 3
    rounds: int = 10
    clients: int = 10
    alpha: float = 0.1
    fixed: tuple[float, ...] = (0.03, 0.1, 0.2, 0.5, 1.0, 3.0)
    probabilities: tuple[float, ...] = (0.1, 0.5)

    def run(self, bench: Bench) -> Outcome:
        """Scores, then the sweep, then the clients' own temperatures."""
        small = replace(self, seeds=1, rounds=min(self.rounds, 3), clients=min(self.clients, 5), fixed=(0.1, 0.5, 3.0))
        sized = small if self.tiny else self
        return joined([sized._scores(bench), sized._sweep(bench), sized._clients(bench)])

    @property
    def _rules(self) -> Mapping[str, str]:
        """Rules of the method, by name."""
        target = "{{_target_: fedssl.temperature.TargetProbability, probability: {}}}"
        return {"max_snr": "max_snr", **{f"p* = {p:g}": target.format(p) for p in self.probabilities}}

    def _options(self, way: str, temperature: float | str, seed: int) -> list[str]:
        alpha = 100.0 if way == EVEN else self.alpha
        split = ("partition=dirichlet", f"partition.alpha={alpha}", f"federation.clients={self.clients}")
        common = ("data=digits", "method=simclr", *QUICK, f"federation.rounds={self.rounds}", f"seed={seed}")
        return [
            *common,
            f"method.temperature={self._rules.get(str(temperature), temperature)}",
            *(CENTRAL if way == "central" else split),
        ]

    def _scores(self, bench: Bench) -> Outcome:
        """The closed form on the mean and deviation of real scores, and the same ratio of the scores themselves."""
        scores = Scores.of(Finished.of(bench.pretrain(*self._options("central", 0.5, 0))))
        ratio = {floor: [gradient_snr(t, *scores.moments, floor) for t in GRID] for floor in FLOORS}
        chosen = {floor: max_snr(*scores.moments, noise_floor=floor) for floor in FLOORS if floor}
        lines = {f"Gaussian scores, floor {floor:g}": Line(GRID, values) for floor, values in ratio.items()}
        lines["scores of digits, floor 1"] = Line(GRID, [scores.snr(t, 1.0) for t in GRID])
        marks = {f"max_snr, floor 1: t = {chosen[1.0]:.2f}": chosen[1.0]}
        k = scores.moments[-1]
        weights = {
            "share of the hardest negative": Line(GRID, [scores.hardest(t) for t in GRID]),
            "effective number of negatives / K": Line(GRID, [scores.effective(t) / k for t in GRID]),
            "mean probability of the positive": Line(GRID, [scores.probability(t) for t in GRID]),
        }
        panels = [
            Panel("temperature t", "signal / noise of the gradient", lines, log_x=True, log_y=True, marks=marks),
            Panel("temperature t", "share", weights, levels={"1 / K": 1 / k}, log_x=True),
        ]
        rows = [
            row("T7 scores", f"max_snr, floor {floor:g}", "temperature", "Gaussian scores", (t, 0.0))
            for floor, t in chosen.items()
        ]
        targets = [_target(scores, p) for p in self.probabilities]
        findings = [*_ratio_findings(scores, ratio, chosen), *(finding for _, finding in targets)]
        return Outcome([*rows, *(r for own, _ in targets for r in own)], {"scores": panels}, findings)

    def _sweep(self, bench: Bench) -> Outcome:
        """Accuracy of fixed temperatures and of the rules."""
        options: list[float | str] = [*self.fixed, *self._rules]
        found: dict[tuple[str, float | str], Stat] = {}
        for way in ("central", "federated"):
            for t in options:
                runs = [Finished.of(bench.pretrain(*self._options(way, t, seed))) for seed in range(self.seeds)]
                found[way, t] = mean_and_deviation([run.few_label() for run in runs])
        rows = [row("T7 sweep", f"t = {t}", "five-label accuracy", way, stat) for (way, t), stat in found.items()]
        panels = [self._curve(found, way) for way in ("central", "federated")]
        findings = [self._as_good(found, way, rule) for way in ("central", "federated") for rule in self._rules]
        return Outcome(rows, {"sweep": panels}, findings)

    def _curve(self, found: Accuracies, way: str) -> Panel:
        said = {rule: "{:.3f} ± {:.3f}".format(*found[way, rule]) for rule in self._rules}
        return Panel(
            "temperature t",
            "accuracy, five labels a class",
            {"fixed temperature": line(self.fixed, [found[way, t] for t in self.fixed])},
            levels={f"{rule}: {said[rule]}": found[way, rule][0] for rule in self._rules},
            log_x=True,
            title="central" if way == "central" else f"federated, Dir({self.alpha:g})",
        )

    def _as_good(self, found: Accuracies, way: str, rule: str) -> Finding:
        best = max(self.fixed, key=lambda t: found[way, t][0])
        worst = min(self.fixed, key=lambda t: found[way, t][0])
        (top, spread), (own, own_spread) = found[way, best], found[way, rule]
        return Finding(
            f"T7 {way}: {rule} is as good as the best fixed temperature",
            own > top - max(spread, own_spread, 0.005),
            f"five-label accuracy {own:.3f} +- {own_spread:.3f} against {top:.3f} +- {spread:.3f} at t = {best:g}, the "
            f"best of {len(self.fixed)}, and {found[way, worst][0]:.3f} at t = {worst:g}, the worst; holds means "
            "within one deviation or 0.005",
        )

    def _clients(self, bench: Bench) -> Outcome:
        """The temperatures that clients choose, by round, with and without skew."""
        skewed = f"Dir({self.alpha:g})"
        lines, findings, rows = {}, [], []
        for rule in self._rules:
            spread: dict[str, Stat] = {}
            for way in (EVEN, skewed):
                chosen = [self._chosen(bench, way, rule, seed) for seed in range(self.seeds)]
                t = np.array([values for values, _ in chosen])  # (seeds, rounds, clients)
                by_round = [(float(v.mean()), float(v.std(1).mean())) for v in t.transpose(1, 0, 2)]
                lines[f"{rule}, {way}"] = line(range(1, self.rounds + 1), by_round)
                later = np.log(t[:, self.rounds // 2 :].mean(1))  # (seeds, clients)
                spread[way] = mean_and_deviation([float(v.std()) for v in later])
                rows.append(row("T7 clients", f"{rule}, {way}", "spread of log t over clients", "end", spread[way]))
                rows.append(row("T7 clients", f"{rule}, {way}", "mean t and spread", "last round", by_round[-1]))
            with_what = {
                name: _correlation(later.ravel(), np.concatenate([about[i] for _, about in chosen]))
                for i, name in enumerate(("entropy of its labels", "number of its examples"))
            }
            findings.append(_apart(rule, skewed, spread, with_what))
        panel = Panel("round", "temperature t of clients", lines, log_y=True)
        return Outcome(rows, {"clients": [panel]}, findings)

    def _chosen(self, bench: Bench, way: str, rule: str, seed: int) -> tuple[list[list[float]], np.ndarray]:
        """Temperatures (rounds, clients), and of each client the entropy of its labels and its size, (2, clients)."""
        rundir = bench.pretrain(*self._options(way, rule, seed))
        counts = np.asarray(rundir.read("split.json")["counts"], dtype=float)  # (clients, classes)
        share = counts / counts.sum(1, keepdims=True)
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
        return by_client(rundir, "temperature"), np.stack([entropy, counts.sum(1)])


def _target(scores: Scores, p: float) -> tuple[list[Row], Finding]:
    """The temperature for p*: of Gaussian scores, without their deviations, and of the scores themselves."""
    mean_p, std_p, mean_n, std_n, k = scores.moments
    simple = (mean_p - mean_n) / math.log(k * p / (1 - p))
    read = float(TargetProbability(p).at(scores.positive, scores.negative, 0.0))
    said = {"without deviations": simple, "read off the scores": read}
    try:
        gauss = for_target_probability(mean_p, mean_n, k, p, positive_std=std_p, negative_std=std_n)
    except ConfigError:  # no temperature reaches p*
        reached = max(1 - probability_moments(t, *scores.moments).missing for t in GRID)
        model, got = f"no temperature reaches it, E[p] is at most {reached:.2f}", math.inf
    else:
        said["Gaussian scores"], got = gauss, scores.probability(gauss)
        model = f"t = {gauss:.3f}, at which the real scores give {got:.3f}"
    rows = [row("T7 scores", f"p* = {p:g}", "temperature", at, (t, 0.0)) for at, t in said.items()]
    return rows, Finding(
        f"T7: the temperature for p* = {p:g} follows from mean and deviation of the scores",
        abs(got - p) < 0.1 * p,
        f"for Gaussian scores {model}; without deviations t = {simple:.3f}, which gives "
        f"{scores.probability(simple):.3f}; read off the scores it is {read:.3f}, which gives "
        f"{scores.probability(read):.3f}; holds means within a tenth of p*",
    )


def _ratio_findings(
    scores: Scores, ratio: Mapping[float, Sequence[float]], chosen: Mapping[float, float]
) -> list[Finding]:
    mean_p, std_p, mean_n, std_n, k = scores.moments
    sharp, flat = scores.hardest(0.001), scores.hardest(1000.0) * k
    maxima = ", ".join(f"t = {t:.2f} for a floor of {floor:g}" for floor, t in chosen.items())
    return [
        Finding(
            "T7: some temperature maximises the gradient's signal-to-noise ratio, without further assumption",
            ratio[0.0][-1] < max(ratio[0.0]),
            f"for scores of mean {mean_p:.2f} +- {std_p:.2f} and {mean_n:.2f} +- {std_n:.2f}, K = {k}, the ratio rises "
            f"from {ratio[0.0][0]:.2f} at t = {GRID[0]:g} to {ratio[0.0][-1]:.0f} at {GRID[-1]:g}, and still grows",
        ),
        Finding(
            "T7: with a noise floor such a temperature exists inside the range",
            all(GRID[0] < t < GRID[-1] for t in chosen.values()),
            f"the maximum lies at {maxima}; the floor is an assumption, and it decides the temperature",
        ),
        Finding(
            "T7: t to 0 gives the hardest negative all weight, t to infinity each the same",
            sharp > 0.95 and abs(flat - 1) < 0.05,
            f"the hardest of {k} has {sharp:.3f} of the weight at t = 0.001, {scores.hardest(0.1):.3f} at 0.1, and "
            f"{flat:.3f} times 1/K at 1000; holds means above 0.95 and within 0.05 of 1",
        ),
    ]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """0 where either is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if min(a.std(), b.std()) > 1e-9 else 0.0


def _apart(rule: str, skewed: str, spread: Mapping[str, Stat], with_what: Mapping[str, float]) -> Finding:
    said = " and ".join(f"{r:.2f} with the {name}" for name, r in with_what.items())
    return Finding(
        f"T7 federated: under label skew clients choose different temperatures ({rule})",
        spread[skewed][0] > 2 * spread[EVEN][0],
        f"over clients log t has the deviation {spread[skewed][0]:.3f} +- {spread[skewed][1]:.3f} under {skewed} and "
        f"{spread[EVEN][0]:.3f} +- {spread[EVEN][1]:.3f} under {EVEN}; under skew a client's log t correlates {said}; "
        "holds means twice the deviation",
    )
