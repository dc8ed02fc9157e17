"""Cosine or dot product (T6): radial gradients and the lengths of what is compared, over training and federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedssl.charts import Panel
from fedssl.theory import log_log_slope
from simulations.studies.base import Bench, Finding, Outcome, mean_and_deviation
from simulations.studies.tools.rows import Stat, line, row, stats
from simulations.studies.tools.runs import CENTRAL, QUICK, Finished, by_client, of_round
from simulations.studies.tools.watched import free_descent

METHODS: Mapping[str, tuple[str, str]] = {
    "simclr": ("SimCLR", "WatchedSimCLR"),
    "simsiam": ("SimSiam", "WatchedSimSiam"),
}
SIMILARITIES = ("cosine", "dot")
TIME = 3.0  # rate times steps of the embeddings without a network
Key = tuple[str, str, str]  # method, similarity, central or federated


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

    def run(self, bench: Bench) -> Outcome:
        """Measure both."""
        small = replace(self, seeds=1, rounds=min(self.rounds, 4), clients=min(self.clients, 5)) if self.tiny else self
        alone, runs = small._alone(), small._runs(bench)
        return Outcome([*alone.table, *runs.table], {**alone.charts, **runs.charts}, [*alone.findings, *runs.findings])

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
            row("T6 embeddings alone", f"{s}: log growth of |z|", "rate", rate, stat)
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
        found = {
            (method, similarity, way): self._measure(bench, method, similarity, way)
            for method in METHODS
            for similarity in SIMILARITIES
            for way in ("central", "federated")
        }
        rows = []
        for (method, similarity, way), values in found.items():
            setting = f"{METHODS[method][0]}, {similarity}, {way}"
            ends = {"first": values["length"][0], "last": values["length"][-1]}
            rows += [row("T6 digits", setting, "mean |z|, round", at, stat) for at, stat in ends.items()]
            rows += [
                row("T6 digits", setting, name, "all rounds" if key != "accuracy" else "end", values[key][0])
                for key, name in (("radial", "size of the radial cosine"), ("accuracy", "five-label accuracy"))
            ]
        charts = {
            "lengths": [self._lengths(method, found) for method in METHODS],
            "radial_and_probes": [_bars(found, "radial"), _bars(found, "accuracy")],
        }
        return Outcome(rows, charts, _findings(found))

    def _measure(self, bench: Bench, method: str, similarity: str, way: str) -> dict[str, list[Stat]]:
        """Mean length by round, size of the radial component over all rounds, and probe accuracy."""
        federation = (f"federation.clients={self.clients}", "partition=dirichlet", f"partition.alpha={self.alpha}")
        options = [
            *("data=digits", f"method={method}", f"method.similarity={similarity}", *QUICK),
            f"method._target_=simulations.studies.tools.watched.{METHODS[method][1]}",
            f"federation.rounds={self.rounds}",
            *(CENTRAL if way == "central" else federation),
            *((f"method.temperature={self.temperature}",) if method == "simclr" else ()),
        ]
        lengths, radial, accuracy = [], [], []
        for seed in range(self.seeds):
            run = bench.pretrain(*options, f"seed={seed}")
            weights = by_client(run, "examples")
            length, size = (
                [of_round(values, w) for values, w in zip(by_client(run, key), weights, strict=True)]
                for key in ("length", "radial_size")
            )
            lengths.append(length)
            radial.append(sum(size) / len(size))
            accuracy.append(Finished.of(run).few_label())
        return {
            "length": stats(lengths),
            "radial": [mean_and_deviation(radial)],
            "accuracy": [mean_and_deviation(accuracy)],
        }

    def _lengths(self, method: str, found: Mapping[Key, Mapping[str, list[Stat]]]) -> Panel:
        lines = {
            f"{similarity}, {way}": line(range(1, self.rounds + 1), found[method, similarity, way]["length"])
            for similarity in SIMILARITIES
            for way in ("central", "federated")
        }
        vectors = "projections" if method == "simclr" else "predictions"
        title = f"{METHODS[method][0]}, its {vectors}"
        return Panel("round", f"mean |z| of the {vectors}", lines, title=title)


def _bars(found: Mapping[Key, Mapping[str, list[Stat]]], key: str) -> Panel:
    shown: dict[str, dict[str, Stat]] = {}
    for (method, similarity, way), values in found.items():
        shown.setdefault(f"{similarity}, {way}", {})[METHODS[method][0]] = values[key][0]
    if key == "accuracy":
        return Panel("", "accuracy, five labels a class", bars=shown)
    return Panel("", "mean |cos(z, dL/dz)|", bars=shown, log_y=True)


def _findings(found: Mapping[Key, Mapping[str, list[Stat]]]) -> list[Finding]:
    radial = {key: values["radial"][0][0] for key, values in found.items()}
    cosine, dot = ({key: size for key, size in radial.items() if key[1] == similarity} for similarity in SIMILARITIES)
    out = [
        Finding(
            "T6: dL/dz is orthogonal to z with cosine and not with dot, centrally and federated",
            max(cosine.values()) < 1e-5 < 1e-2 < min(dot.values()),
            f"the mean |cos(z, dL/dz)| of float32 training is at most {max(cosine.values()):.1e} with cosine and at "
            f"least {min(dot.values()):.2f} with dot; holds means below 1e-5 and above 0.01",
        )
    ]
    for method, (name, _) in METHODS.items():
        ratio: dict[tuple[str, str], float] = {}
        accuracy: dict[tuple[str, str], Stat] = {}
        for similarity in SIMILARITIES:
            for way in ("central", "federated"):
                values = found[method, similarity, way]
                ratio[similarity, way] = values["length"][-1][0] / values["length"][0][0]
                accuracy[similarity, way] = values["accuracy"][0]
        out += [_runaway(f"{name} {way}", ratio["dot", way], ratio["cosine", way]) for way in ("central", "federated")]
        out.append(_better(name, accuracy))
    return out


def _runaway(where: str, dot: float, cosine: float) -> Finding:
    return Finding(
        f"T6: with dot lengths run away, {where}",
        dot > 2 * cosine,
        f"from the first to the last round mean |z| changes by the factor {dot:.2f} with dot and {cosine:.2f} with "
        "cosine (weights move all z at once, so cosine does not keep it either); holds means twice the factor",
    )


def _better(name: str, accuracy: Mapping[tuple[str, str], Stat]) -> Finding:
    said: list[str] = []
    wins: list[bool | None] = []
    for way in ("central", "federated"):
        (a, da), (b, db) = accuracy["cosine", way], accuracy["dot", way]
        said.append(f"{way} {a:.3f} +- {da:.3f} against {b:.3f} +- {db:.3f}")
        wins.append(a > b if abs(a - b) > max(da, db) > 0 else None)  # one seed has no deviation
    verdict = wins[0] if wins[0] == wins[1] else (None if None in wins else False)
    return Finding(
        f"T6: {name} learns better with cosine than with dot",
        verdict,
        f"five-label accuracy {' and '.join(said)}; undecided where the difference is within one deviation",
    )
