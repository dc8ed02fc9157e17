"""What negatives teach: InfoNCE's critic (T3) and its bound on the information (T4), with batches of all and local."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedssl import seeds
from fedssl.diagnostics import mutual_information_bound
from fedssl.errors import ConfigError
from fedssl.losses import nt_xent
from fedssl.report.charts import Line, Panel
from fedssl.theory import asymptotic_bias, gaussian_correlation, info_nce_bias, log_log_slope
from simulations.studies.base import Bench, Finding, Outcome, check, mean_and_deviation
from simulations.studies.tools import clusters
from simulations.studies.tools.clusters import Clusters, source
from simulations.studies.tools.recovery import Recovery
from simulations.studies.tools.rows import Row, joined, line, over_seeds, row, stats
from simulations.studies.tools.runs import QUICK, Finished

MISSED = "nats that local batches miss, optimal critic"
RUNS = ("data=digits", "method=simclr", "partition=dirichlet", *QUICK)


@dataclass(frozen=True)
class Negatives:
    """T3 on finite joints with tables as critics; T4 on Gaussians, on clusters of them, and on digits.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, 1 or more.
        information: I(x; y) in nats of the Gaussians, the first of which is also that within a cluster.
        candidates: N, how many pairs are in a batch of the Gaussians and clusters.
        trials: anchors in each estimate of a bias.
        skews: probability with which a client draws from its own outcomes or cluster.
        clients: of the finite joints; there are as many clusters as 4.
        outcomes: values of x and of y.
        negatives: K of the tables that are merged once.
        many: K of the tables that are merged after every step.
        steps: of each table.
        rounds: of the critics on clusters, 20 steps a client each, and of the runs on digits.
        alphas: label skew of the runs on digits, Dir(alpha).
    """

    tiny: bool = False
    seeds: int = 3
    information: tuple[float, ...] = (1.0, 3.0)
    candidates: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    trials: int = 16384
    skews: tuple[float, ...] = (0.0, 0.5, 0.75, 0.9, 0.95)
    clients: int = 3
    outcomes: int = 6
    negatives: int = 8
    many: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    steps: int = 400
    rounds: int = 20
    alphas: tuple[float, ...] = (100.0, 0.1)

    def __post_init__(self) -> None:
        check(self, zero=("skews",))
        if len(self.skews) < 2 or self.skews[0] != 0 or list(self.skews) != sorted(self.skews) or self.skews[-1] >= 1:
            raise ConfigError(
                f"study.skews is {self.skews}, but skew is compared with none: let it rise from 0, below 1"
            )
        if min(self.candidates) < 2 or self.outcomes < 2:
            raise ConfigError("study.candidates and study.outcomes need 2 or more: nothing is told apart from itself")

    def run(self, bench: Bench) -> Outcome:
        """Measure all parts."""
        sized = self._small() if self.tiny else self
        parts = [sized._gaussians(bench), sized._clusters(bench), sized._digits(bench)]
        parts.append(sized._recovery().measure(bench))
        return joined(parts)

    def _small(self) -> Negatives:
        return replace(
            self,
            seeds=1,
            candidates=(4, 16, 64, 256),
            trials=min(self.trials, 4096),
            skews=(0.0, 0.9),
            many=(1, 16),
            steps=min(self.steps, 200),
            rounds=min(self.rounds, 5),
        )

    def _recovery(self) -> Recovery:
        return Recovery(self.seeds, self.skews, self.clients, self.outcomes, self.negatives, self.many, self.steps)

    def _gaussians(self, bench: Bench) -> Outcome:
        """T4 with the optimal critic: bias against N."""
        bench.reporter.say("T4: Gaussians of known information")
        rows: list[Row] = []
        lines, findings = {}, []
        for nats in self.information:
            rho = gaussian_correlation(nats, 2)
            found = []
            for n in self.candidates:
                each = [info_nce_bias(rho, 2, n, trials=self.trials, seed=s) for s in range(self.seeds)]
                found.append(mean_and_deviation([e.value for e in each]))
                law, setting = asymptotic_bias(nats, n), f"I = {nats:g} nats, N = {n}"
                expected = law if law <= nats else None
                rows.append(row("Gaussians", "central", setting, "bias of the bound, nats", found[-1], expected))
            bias = [m for m, _ in found]
            lines[f"I = {nats:g} nats, optimal critic"] = line(self.candidates, found)
            if len((curve := _law(nats, self.candidates)).x) > 1:
                lines[f"(exp(2 I) - 1) / 2N, I = {nats:g}"] = curve
            tail = len(self.candidates) // 2
            slope = log_log_slope(self.candidates[tail:], np.maximum(bias[tail:], 1e-6))
            findings.append(
                Finding(
                    f"T4: the bound's bias falls like 1/N (I = {nats:g} nats)",
                    abs(slope + 1) < 0.15,
                    f"from N = {self.candidates[tail]} to {self.candidates[-1]} the slope of log bias by log N is "
                    f"{slope:.2f}, {bias[tail]:.3f} to {bias[-1]:.3f} nats; the law begins at N well above exp(2 I) = "
                    f"{math.exp(2 * nats):.0f}; holds means within 0.15 of -1",
                )
            )
        panel = Panel("candidates N", "bias I - (ln N - L) (nats)", lines, log_x=True, log_y=True)
        return Outcome(rows, {"bias_against_candidates": [panel]}, findings)

    def _clusters(self, bench: Bench) -> Outcome:
        """T4 with clients that hold different clusters: local batches, and a critic by federated averaging."""
        world = Clusters(inside=self.information[0])
        rows: list[Row] = []
        clients = f"{world.count} clients"
        whole = over_seeds(lambda s: world.information(world.weights(0.0), 200_000, _rng("whole", s)), self.seeds)[0]
        lines, bars = {}, []
        for skew in sorted({0.0, self.skews[-1], 1.0}):
            bench.reporter.say(f"T4: clusters, skew {skew:g}")
            bars.append(self._cluster_critics(world, skew, whole))
            missing = [over_seeds(partial(self._missing, world, whole, skew, n), self.seeds) for n in self.candidates]
            lines[f"local batches, skew {skew:g}"] = Line(self.candidates, [m for m, _ in missing])
            rows += [
                row("clusters", clients, f"skew {skew:g}, N = {n}", MISSED, found, whole - bars[-1]["own"][0])
                for n, found in zip(self.candidates, missing, strict=True)
            ]
        labels = {"own": "information of a client's pairs", "local": "bound in local batches",
                  "union": "same critic, batches of all"}  # fmt: skip
        for bar in bars:
            expected = {"own": None, "local": bar["own"][0], "union": whole}
            rows += [
                row("clusters", clients, f"skew {bar['skew'][0]:g}", f"{label}, nats", bar[key], expected[key])
                for key, label in labels.items()
            ]
        central = bars[0]["union"]
        curve = Panel("candidates N", "I of all pairs - bound (nats)", lines, log_x=True, log_y=True)
        shown = {label: {f"skew {bar['skew'][0]:g}": bar[key] for bar in bars} for key, label in labels.items()}
        panel = Panel("", "information (nats)", bars=shown, levels={"I of all pairs": whole})
        last, ends = bars[-1], lines[f"local batches, skew {bars[-1]['skew'][0]:g}"]
        middle = bars[-2]
        findings = [
            Finding(
                "T4 federated: more candidates in local batches close the gap to the information of all data",
                ends.y[-1] < 0.1,
                f"where each client holds one cluster, {ends.y[-1]:.2f} nats of {whole:.2f} are still missing at N = "
                f"{self.candidates[-1]}: a local batch never shows which cluster, and its optimum is the client's own "
                f"{last['own'][0]:.2f}; with IID clients {lines['local batches, skew 0'].y[-1]:.3f} are missing; holds "
                "means below 0.1",
            ),
            Finding(
                "T4 federated: a critic averaged from skewed clients still tells the pairs of all data apart",
                last["union"][0] > central[0] - 0.1,
                f"in batches of all data it reaches {middle['union'][0]:.2f} nats at skew {middle['skew'][0]:g} and "
                f"{last['union'][0]:.2f} at skew 1, from IID clients {central[0]:.2f}; holds means that skew 1 "
                "costs less than 0.1",
            ),
        ]
        return Outcome(rows, {"local_batches": [curve, panel]}, findings)

    def _missing(self, world: Clusters, whole: float, skew: float, candidates: int, seed: int) -> float:
        """Nats of the union that the optimal critic of a client misses; clients are rotations of one another."""
        own = world.weights(skew)
        rng = _rng("bias", seed, str(skew), candidates)
        inside = world.information(own, 200_000, _rng("whole", seed)) if skew else whole
        return whole - inside + world.bias(own, candidates, self.trials, rng)

    def _cluster_critics(self, world: Clusters, skew: float, whole: float) -> dict[str, tuple[float, float]]:
        """A trained critic's bounds, and the information of a client's own pairs."""
        n, own, everything = 256, world.weights(skew), world.weights(0.0)
        values: dict[str, list[float]] = {"own": [], "local": [], "union": []}
        for s in range(self.seeds):
            draws = [source(world, world.weights(skew, k), s, "train", k) for k in range(world.count)]
            model = clusters.train(draws, 128, self.rounds, 20, s)
            values["own"].append(world.information(own, 200_000, _rng("whole", s)) if skew else whole)
            values["local"].append(clusters.bound(model, source(world, own, s, "local"), n, self.trials))
            values["union"].append(clusters.bound(model, source(world, everything, s, "union"), n, self.trials))
        return {"skew": (skew, 0.0), **{key: mean_and_deviation(found) for key, found in values.items()}}

    def _digits(self, bench: Bench) -> Outcome:
        """T4 in real runs: one merged model, its bound in batches of one client and in batches of all."""
        sizes = (4, 8, 16, 32, 64)
        rows: list[Row] = []
        lines: dict[str, Line] = {}
        for alpha in self.alphas:
            found: dict[str, list[list[float]]] = {"all clients": [], "one client": []}
            for s in range(self.seeds):
                run = Finished.of(bench.pretrain(*RUNS, f"partition.alpha={alpha}", f"federation.rounds={self.rounds}",
                                                 f"seed={s}"))  # fmt: skip
                everyone = [np.arange(len(run.data.train))] * len(run.shards)
                found["all clients"].append([_bound(run, everyone, b) for b in sizes])
                found["one client"].append([_bound(run, run.shards, b) for b in sizes])
            for kind, values in found.items():
                curve = line([2 * b - 1 for b in sizes], stats(values))
                lines[f"Dir({alpha:g}), batches of {kind}"] = curve
                rows += [
                    row("digits", f"Dir({alpha:g})", f"batches of {kind}, N = {n:g}", "bound, nats", found_at)
                    for n, found_at in zip(curve.x, stats(values), strict=True)
                ]
        ends = {name: curve.y[-1] for name, curve in lines.items()}
        lost = [ends[f"Dir({a:g}), batches of all clients"] - ends[f"Dir({a:g}), batches of one client"]
                for a in self.alphas]  # fmt: skip
        panel = Panel("candidates N = 2B - 1", "bound ln N - L (nats)", lines, log_x=True)
        finding = Finding(
            "T4 federated, digits: label skew lowers the bound that local batches reach with one and the same model",
            lost[-1] > max(0.0, lost[0]) + 0.02,
            f"at N = {2 * sizes[-1] - 1} a client's own batches show {lost[-1]:.3f} nats less than batches of all "
            f"clients under Dir({self.alphas[-1]:g}), and {lost[0]:.3f} less under Dir({self.alphas[0]:g})",
        )
        return Outcome(rows, {"digits": [panel]}, [finding])


def _bound(run: Finished, parts: Sequence[np.ndarray], batch: int) -> float:
    """The mean over clients of `ln(2B - 1) - L` in batches of B drawn from their rows; clients with fewer are left out.

    Batch normalisation reads the batch, as in training; a few batches from each client.
    """
    values, weights = [], []
    method: Any = run.job.method
    for client, rows in enumerate(parts):
        if len(rows) < 64:
            continue
        rng, generator = seeds.stream(0, "bound", client), seeds.torch_stream(0, "bound", client)
        for _ in range(max(2, 256 // batch)):
            index = torch.from_numpy(rng.choice(rows, batch, replace=False))
            z = run.projections(index, generator)
            loss = nt_xent(z[0], z[1], temperature=method.temperature, similarity=method.similarity).mean()
            values.append(mutual_information_bound(float(loss), 2 * batch - 1))
            weights.append(len(rows))
    return float(np.average(values, weights=weights))


def _law(nats: float, candidates: Sequence[int]) -> Line:
    """The asymptote, where it is no more than I."""
    kept = [n for n in candidates if asymptotic_bias(nats, n) <= nats]
    return Line(kept, [asymptotic_bias(nats, n) for n in kept])


def _rng(name: str, seed: int, *path: str | int) -> np.random.Generator:
    return seeds.stream(seed, "study", "negatives", name, *path)
