"""The temperature (T7): what it does to scores, which one the rules choose, alone and for each client under skew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedssl.errors import ConfigError
from fedssl.report.charts import Line, Panel
from fedssl.rundir import RunDirectory
from fedssl.temperature import TargetProbability
from fedssl.theory import for_target_probability, gradient_snr, max_snr, probability_moments
from simulations.studies.base import Bench, Finding, Outcome, check, mean_and_deviation
from simulations.studies.tools.rows import Row, Stat, joined, line, pair, row
from simulations.studies.tools.runs import Finished, by_client
from simulations.studies.tools.scores import Scores
from simulations.studies.tools.sweeps import Sweep, places

FLOORS = (0.0, 0.3, 1.0, 3.0)
GRID = tuple(float(t) for t in np.geomspace(0.02, 10.0, 25))
SKEWED, EVEN = "skewed clients", "even clients"  # Dir(alpha) and Dir(100)
ACCURACY = "accuracy, 5 labels a class"


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

    def __post_init__(self) -> None:
        check(self)
        if max(self.probabilities) >= 1:
            raise ConfigError(f"study.probabilities is {self.probabilities}, but softmax stays below 1: lower them")

    def run(self, bench: Bench) -> Outcome:
        """Scores, then the sweep, then the clients' own temperatures."""
        small = replace(self, seeds=1, rounds=min(self.rounds, 3), clients=min(self.clients, 5), fixed=(0.1, 0.5, 3.0))
        sized = small if self.tiny else self
        scored = sized._swept(bench, ("central",), (0.5,)).runs["central", _name(0.5)][0]
        sweep = sized._swept(bench, ("central", SKEWED), [*sized.fixed, *sized._rules])
        chosen = sized._swept(bench, (SKEWED, EVEN), list(sized._rules))
        return joined([sized._scores(Scores.of(Finished.of(scored))), sized._sweep(sweep), sized._clients(chosen)])

    @property
    def _rules(self) -> Mapping[str, str]:
        """Rules of the method, by name."""
        target = "{{_target_: fedssl.temperature.TargetProbability, probability: {}}}"
        return {"max_snr": "max_snr", **{f"p* = {p:g}": target.format(p) for p in self.probabilities}}

    def _swept(self, bench: Bench, where: Sequence[str], temperatures: Sequence[float | str]) -> Sweep:
        """Runs at fixed temperatures and with rules, probed with five labels a class."""
        every = places(self.clients, self.alpha) | {EVEN: places(self.clients, 100.0)[SKEWED]}
        settings = {
            _name(t): ("method=simclr", f"method.temperature={self._rules.get(str(t), t)}") for t in temperatures
        }
        common = (f"federation.rounds={self.rounds}",)
        return Sweep.of(bench, {place: every[place] for place in where}, settings, common, self.seeds, _measure)

    def _scores(self, scores: Scores) -> Outcome:
        """The closed form on the mean and deviation of real scores, and the same ratio of the scores themselves."""
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
            row("scores", "central", f"max_snr, floor {floor:g}", "temperature", (t, 0.0))
            for floor, t in chosen.items()
        ]
        targets = [_target(scores, p) for p in self.probabilities]
        findings = [*_ratio_findings(scores, ratio, chosen), *(finding for _, finding in targets)]
        return Outcome([*rows, *(r for own, _ in targets for r in own)], {"scores": panels}, findings)

    def _sweep(self, sweep: Sweep) -> Outcome:
        """Accuracy of fixed temperatures and of the rules."""
        panels = [self._curve(sweep, place) for place in sweep.places]
        findings = [self._as_good(sweep, place, rule) for place in sweep.places for rule in self._rules]
        return Outcome(sweep.rows("sweep"), {"sweep": panels}, findings)

    def _curve(self, sweep: Sweep, place: str) -> Panel:
        rules = {rule: sweep.stat(place, rule, ACCURACY) for rule in self._rules}
        return Panel(
            "temperature t",
            ACCURACY,
            {"fixed temperature": line(self.fixed, [sweep.stat(place, _name(t), ACCURACY) for t in self.fixed])},
            levels={f"{rule}: {pair(found)}": found[0] for rule, found in rules.items()},
            log_x=True,
            title=place,
        )

    def _as_good(self, sweep: Sweep, place: str, rule: str) -> Finding:
        found = {t: sweep.stat(place, _name(t), ACCURACY) for t in self.fixed}
        best, worst = (choose(found, key=lambda t: found[t][0]) for choose in (max, min))
        own, top = sweep.stat(place, rule, ACCURACY), found[best]
        return Finding(
            f"T7, {place}: {rule} is as good as the best fixed temperature",
            own[0] > top[0] - max(top[1], own[1], 0.005),
            f"5 labels a class give {pair(own)} against {pair(top)} at t = {best:g}, the best of {len(found)}, and "
            f"{pair(found[worst])} at t = {worst:g}, the worst; holds means within one deviation or 0.005",
        )

    def _clients(self, sweep: Sweep) -> Outcome:
        """The temperatures that clients choose, by round, with and without skew."""
        lines, findings, rows = {}, [], []
        for rule in self._rules:
            spread: dict[str, Stat] = {}
            for place in (EVEN, SKEWED):
                chosen = [_chosen(run) for run in sweep.runs[place, rule]]
                t = np.array([values for values, _ in chosen])  # (seeds, rounds, clients)
                by_round = [(float(v.mean()), float(v.std(1).mean())) for v in t.transpose(1, 0, 2)]
                lines[f"{rule}, {place}"] = line(range(1, self.rounds + 1), by_round)
                later = np.log(t[:, self.rounds // 2 :].mean(1))  # (seeds, clients)
                spread[place] = mean_and_deviation([float(v.std()) for v in later])
                rows.append(row("clients", place, rule, "spread of log t over clients, later half", spread[place]))
                rows.append(row("clients", place, rule, "mean t, last round; spread over clients", by_round[-1]))
            with_what = {
                name: _correlation(later.ravel(), np.concatenate([about[i] for _, about in chosen]))
                for i, name in enumerate(("entropy of its labels", "number of its examples"))
            }
            findings.append(_apart(rule, spread, with_what))
        panel = Panel("round", "temperature t of clients", lines, log_y=True)
        return Outcome(rows, {"clients": [panel]}, findings)


def _name(temperature: float | str) -> str:
    """Of a setting."""
    return temperature if isinstance(temperature, str) else f"t = {temperature:g}"


def _measure(run: RunDirectory) -> dict[str, float]:
    return {ACCURACY: Finished.of(run).few_label()}


def _chosen(run: RunDirectory) -> tuple[list[list[float]], np.ndarray]:
    """Temperatures (rounds, clients), and of each client the entropy of its labels and its size, (2, clients)."""
    counts = np.asarray(run.read("split.json")["counts"], dtype=float)  # (clients, classes)
    share = counts / counts.sum(1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
    return by_client(run, "temperature"), np.stack([entropy, counts.sum(1)])


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
    rows = [row("scores", "central", f"p* = {p:g}, {how}", "temperature", (t, 0.0)) for how, t in said.items()]
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


def _apart(rule: str, spread: Mapping[str, Stat], with_what: Mapping[str, float]) -> Finding:
    said = " and ".join(f"{r:.2f} with the {name}" for name, r in with_what.items())
    return Finding(
        f"T7 federated: under label skew clients choose different temperatures ({rule})",
        spread[SKEWED][0] > 2 * spread[EVEN][0],
        f"over clients log t has the deviation {pair(spread[SKEWED])} under skew and {pair(spread[EVEN])} under "
        f"Dir(100); under skew a client's log t correlates {said}; holds means twice the deviation",
    )
