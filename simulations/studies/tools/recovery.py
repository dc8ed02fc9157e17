"""T3 measured: which critic tables learn, alone and averaged over clients with noise of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedssl import seeds
from fedssl.report.charts import Line, Panel
from simulations.studies.base import Bench, Finding, Outcome, mean_and_deviation
from simulations.studies.tools import tables
from simulations.studies.tools.rows import line, row
from simulations.studies.tools.tables import SETTINGS, World

OWN, ANCHORS, TARGETS, CLASSES = SETTINGS
BIAS = "bias of the critic, nats (RMS)"


@dataclass(frozen=True)
class Recovery:
    """Sizes as in the study `negatives`."""

    seeds: int
    skews: tuple[float, ...]
    clients: int
    outcomes: int
    negatives: int
    many: tuple[int, ...]
    steps: int
    batch: int = 1024

    def measure(self, bench: Bench) -> Outcome:
        """Pooled training, one merge, a merge after every step."""
        once = {(name, skew): self._once(name, skew, bench) for name in SETTINGS for skew in self.skews}
        steps = {name: self._each_step(name, bench) for name in (OWN, CLASSES)}
        where = f"{self.clients} clients"
        rows = [
            row("critic merged once", where, f"{name}, skew {skew:g}", BIAS, found["bias"], found["predicted"][0])
            for (name, skew), found in once.items()
        ]
        rows += [row("critic of everything", "central", OWN, BIAS, once[OWN, self.skews[0]]["pooled"], 0.0)]
        for name, (values, few, limit) in steps.items():
            at_ends = {1: few, max(self.many): limit}
            rows += [
                row("critic merged every step", where, f"{name}, K = {k}", BIAS, found, at_ends.get(k))
                for k, found in zip(self.many, values, strict=True)
            ]
        return Outcome(rows, {"critic_against_skew": self._panels(once, steps)}, self._findings(once, steps))

    def _train(self, world: World, seed: int, negatives: int, every: int = 0) -> np.ndarray:
        return tables.train(world, self.steps, self.batch, negatives, seed, every=every)

    def _world(self, name: str, skew: float, seed: int) -> World:
        return SETTINGS[name](self.outcomes, self.clients, skew, seeds.stream(seed, "study", "joint"))

    def _once(self, name: str, skew: float, bench: Bench) -> dict[str, tuple[float, float]]:
        """Root mean square bias of tables merged once, its prediction, and what pooled training misses."""
        bench.reporter.say(f"T3: {name}, skew {skew:g}")
        found: dict[str, list[float]] = {key: [] for key in ("bias", "predicted", "pooled", "ratio", "slope", "r")}
        for seed in range(self.seeds):
            world = self._world(name, skew, seed)
            truth, expected = world.ratio(), world.predicted()
            bias = self._train(world, seed, self.negatives) - truth
            found["bias"].append(world.spread(bias))
            found["predicted"].append(world.spread(expected))
            found["ratio"].append(world.spread(truth))
            if found["predicted"][-1] > 0.01:
                slope, r = tables.fit_of(world.free(bias).ravel(), world.free(expected).ravel())
                found["slope"].append(slope)
                found["r"].append(r)
            if skew == self.skews[0]:
                found["pooled"].append(world.spread(self._train(world.pooled(), seed, self.negatives) - truth))
        return {key: mean_and_deviation(values) for key, values in found.items() if values}

    def _each_step(self, name: str, bench: Bench) -> tuple[list[tuple[float, float]], float, float]:
        """Bias against K of tables merged after every step, at the second strongest skew, and its two known ends."""
        skew = self.skews[-2] if len(self.skews) > 2 else self.skews[-1]
        bench.reporter.say(f"T3: {name}, merged after every step")
        values, worlds = [], [self._world(name, skew, seed) for seed in range(self.seeds)]
        for k in self.many:
            spreads = [w.spread(self._train(w, s, k, every=1) - w.ratio()) for s, w in enumerate(worlds)]
            values.append(mean_and_deviation(spreads))
        few, limit = (float(np.mean([w.spread(w.predicted_of_steps(k)) for w in worlds])) for k in (1, math.inf))
        return values, few, limit

    def _panels(self, once: Any, steps: Any) -> Sequence[Panel]:
        bias = {name: line(self.skews, [once[name, skew]["bias"] for skew in self.skews]) for name in SETTINGS}
        expected = {
            f"predicted: {name}": Line(self.skews, [once[name, skew]["predicted"][0] for skew in self.skews])
            for name in (OWN, CLASSES)
        }
        merged = {name: line(self.many, values) for name, (values, _, _) in steps.items()}
        limits = {f"{name}, K → ∞": limit for name, (_, _, limit) in steps.items()}
        return [
            Panel("skew of the clients", BIAS, {**bias, **expected}, title="local critics, averaged once"),
            Panel("negatives K", BIAS, merged, levels=limits, log_x=True, title="averaged after every step"),
        ]

    def _findings(self, once: Any, steps: Any) -> list[Finding]:
        first, last = self.skews[0], self.skews[-1]
        pooled, size = once[OWN, first]["pooled"], once[OWN, first]["ratio"][0]
        own, classes, targets = (once[name, last] for name in (OWN, CLASSES, TARGETS))
        noise = pooled[0]
        values, few, limit = steps[OWN]
        return [
            Finding(
                "T3: a trained critic recovers log p(y|x) - log q(y) up to c(x)",
                pooled[0] < 0.1 * size,
                f"trained on everything it is off by {pooled[0]:.3f} nats (RMS) where the ratio spreads over "
                f"{size:.2f}; holds means below a tenth",
            ),
            Finding(
                "T3 federated: the average of local critics is off by log q - mean log q_k",
                abs(own["slope"][0] - 1) < 0.1 and own["r"][0] > 0.95,
                f"with stores of negatives of skew {last:g} the bias is {own['bias'][0]:.3f} nats (RMS), predicted "
                f"{own['predicted'][0]:.3f}; entry by entry it is {own['slope'][0]:.2f} times the prediction, "
                f"correlation {own['r'][0]:.3f}; holds means within 0.1 of 1 and above 0.95",
            ),
            Finding(
                "T3 federated: any label skew biases the average of local critics",
                min(classes["bias"][0], targets["bias"][0]) > 2 * noise and targets["predicted"][0] > 0.01,
                f"at skew {last:g} two views of skewed classes give {classes['bias'][0]:.3f} nats (predicted "
                f"{classes['predicted'][0]:.3f}), but skewed targets with a common p(x|y) {targets['bias'][0]:.3f} "
                f"(predicted {targets['predicted'][0]:.3f}): there log p_k(y|x) / p_k(y) differs from client to "
                "client by c(x) only",
            ),
            Finding(
                "T3 federated: averaging after every step removes the bias",
                values[-1][0] < 2 * noise,
                f"with one negative {values[0][0]:.3f} nats are left (exactly {few:.3f}, and training's own noise is "
                f"{noise:.3f}), with {self.many[-1]} {values[-1][0]:.3f}, towards {limit:.3f} for K to infinity: a set "
                "of negatives tells which client drew it",
            ),
        ]
