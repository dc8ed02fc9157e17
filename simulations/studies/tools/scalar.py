"""T8 on two weights: what the Jacobian of linear SimSiam predicts, and what simulated encoders do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedssl import seeds
from fedssl.report.charts import Line, Panel
from fedssl.theory import LinearSimSiam, averaged_rate, linear_simsiam, simulate_linear_simsiam
from simulations.studies.base import Finding, Outcome
from simulations.studies.tools.rows import row

_SMALL = 1e-8  # an encoder at the collapsed point, for practical purposes
_STEP = 0.001  # of the simulations: a flow, nearly
_HELD = {"predictor_rate": 0.0}


def _name(stop: bool) -> str:
    return "with stop-gradient" if stop else "without"


def _measured(predictor: float, model: LinearSimSiam, time: float = 2.0) -> float:
    """The growth rate of a small encoder in a simulation."""
    path = simulate_linear_simsiam(_SMALL, predictor, model, rate=_STEP, steps=round(time / _STEP))
    return math.log(abs(path[-1, 0, 0]) / _SMALL) / time


def jacobian(noise: float, points: int) -> Outcome:
    """The encoder's eigenvalue at w = 0 for predictors that are held, predicted and simulated, for both losses."""
    grid = np.linspace(-0.5, 1.5, 8 * points + 1)
    rows, panels, errors, signs = [], [], [], {}
    for loss in ("mse", "dot"):
        lines = {}
        for stop in (True, False):
            model = LinearSimSiam(noise=noise, stop_gradient=stop, loss=loss, predictor_rate=0.0)
            expected = [linear_simsiam(p, model)[0].encoder_rate for p in grid]
            found = [_measured(p, model) for p in grid[::8]]
            errors += [abs(a - b) for a, b in zip(expected[::8], found, strict=True)]
            signs[loss, stop] = np.sign(np.round(expected, 9))
            lines[f"{_name(stop)}, Jacobian"] = Line(list(grid), expected)
            lines[f"{_name(stop)}, simulated"] = Line(list(grid[::8]), found, joined=False)
            rows += [
                row("Jacobian", "central", f"{loss}, {_name(stop)}, p = {p:.2f}", "growth rate of w", (b, 0.0), a)
                for p, a, b in zip(grid[::8], expected[::8], found, strict=True)
            ]
        title = {"mse": "squared error", "dot": "dot product"}[loss] + ": above 0 the encoder leaves collapse"
        panels.append(
            Panel("predictor p", "growth rate of |w|", lines, levels={"no growth": 0.0},
                  marks={"p = kappa": LinearSimSiam(noise=noise).correlation}, title=title)
        )  # fmt: skip
    kappa, changed = LinearSimSiam(noise=noise).correlation, signs["mse", True] != signs["mse", False]
    open_to, same = grid[signs["mse", True] > 0], signs["dot", True] == signs["dot", False]
    findings = [
        Finding(
            "T8: stop-gradient changes the stability of the collapsed point of the linear model",
            bool(changed.any()),
            f"under the squared error with views of correlation kappa = {kappa:.3f} the encoder's eigenvalue is above "
            f"0 for p from {open_to.min():.2f} to {open_to.max():.2f} with stop-gradient and for no p without; under "
            f"the dot product both signs agree at {100 * float(same.mean()):.0f} % of all p: there it only halves the "
            "rate",
        ),
        Finding(
            "T8, the text's words: collapse is unstable without stop-gradient and stable with it",
            bool((signs["mse", True] < 0).all() and (signs["mse", False] > 0).all()),
            "computed, it is the reverse under the squared error: without stop-gradient the largest eigenvalue of any p"
            f" is {max(panels[0].lines['without, Jacobian'].y):.2f}, and with it collapse is unstable for 0 < p < "
            "kappa; under the dot product it is unstable for p > 0 either way",
        ),
        Finding(
            "T8: the Jacobian predicts how simulated encoders near collapse move",
            max(errors) < 0.01,
            f"the largest difference of growth rates over {len(errors)} simulations is {max(errors):.1e}; holds means "
            "below 0.01",
        ),
    ]
    return Outcome(rows, {"jacobian": panels}, findings)


@dataclass(frozen=True)
class Averaging:
    """Clients whose augmentations differ, and that average their two weights after each round.

    Args:
        noises: s of each client.
        predictor: p where it is held.
        times: lengths of local training, in units of the flow's time.
    """

    noises: tuple[float, ...] = (0.0, 0.5, 1.5, 3.0)
    predictor: float = 0.6
    times: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

    def _clients(self, stop: bool, **options: float) -> list[LinearSimSiam]:
        return [LinearSimSiam(noise=s, stop_gradient=stop, **options) for s in self.noises]  # type: ignore[arg-type]

    def rates(self) -> Outcome:
        """How fast a small w grows against the length of local training; predictors are held."""
        rows, lines, errors = [], {}, []
        found: dict[bool, list[float]] = {}
        own = {stop: self._own(stop) for stop in (True, False)}
        for stop in (True, False):
            expected = [averaged_rate(own[stop], time) for time in self.times]
            found[stop] = [self._simulated(stop, time) for time in self.times]
            errors += [abs(a - b) for a, b in zip(expected, found[stop], strict=True)]
            lines[f"{_name(stop)}, predicted"] = Line(self.times, expected)
            lines[f"{_name(stop)}, simulated"] = Line(self.times, found[stop], joined=False)
            rows += [
                row("averaged rate", f"{len(self.noises)} clients", f"{_name(stop)}, T = {time:g}", "growth rate of w",
                    (b, 0.0), a) for time, a, b in zip(self.times, expected, found[stop], strict=True)
            ]  # fmt: skip
        mean, best = float(np.mean(own[True])), max(own[True])
        levels = {"mean of the clients (pooled)": mean, "best client": best}
        panel = Panel("local training T between merges (flow time)", "growth rate of |w|", lines, levels=levels,
                      log_x=True)  # fmt: skip
        short, long = found[True][0], found[True][-1]
        findings = [
            Finding(
                "T8 federated: the rates of the clients' Jacobians predict the averaged clients",
                max(errors) < 0.01,
                f"log mean exp(rate T) / T differs from {len(errors)} simulations by at most {max(errors):.1e}; holds "
                "means below 0.01",
            ),
            Finding(
                "T8 federated: averaging keeps the stability that the pooled data's Jacobian gives",
                bool(np.sign(short) == np.sign(mean) and np.sign(long) == np.sign(mean)),
                f"the pooled rate is {mean:.2f} (collapse attracts), merging every {self.times[0]:g} gives {short:.2f},"
                f" every {self.times[-1]:g} gives {long:.2f}: with long local training the clients with clean views "
                f"(best rate {best:.2f}) carry the average out of collapse; without stop-gradient it stays at "
                f"{found[False][0]:.2f} to {found[False][-1]:.2f}",
            ),
        ]
        return Outcome(rows, {"averaging": [self.trajectories(), panel]}, findings)

    def _own(self, stop: bool) -> list[float]:
        """Each client's eigenvalue, of the same step size as the simulation."""
        clients = self._clients(stop, **_HELD)
        return [linear_simsiam(self.predictor, model)[0].encoder_rate for model in clients]

    def _simulated(self, stop: bool, time: float) -> float:
        rate = min(0.005, time / 50)
        steps, rounds = round(time / rate), max(2, round(3 / time))
        path = simulate_linear_simsiam(_SMALL, self.predictor, self._clients(stop, **_HELD), rate=rate, steps=steps,
                                       rounds=rounds)  # fmt: skip
        return math.log(abs(path[-1, 0, 0]) / _SMALL) / (steps * rounds * rate)

    def trajectories(self, length: float = 40.0) -> Panel:
        """|w| against time with trained predictors: one model on the pooled views, and averaged clients."""
        pooled = float(np.mean(self.noises))
        lines, rate, steps = {}, 0.01, 200
        for stop in (True, False):
            single = LinearSimSiam(noise=pooled, stop_gradient=stop)
            one = simulate_linear_simsiam(0.05, 0.3, single, rate=rate, steps=round(length / rate))
            many = simulate_linear_simsiam(0.05, 0.3, self._clients(stop), rate=rate, steps=steps,
                                           rounds=round(length / rate / steps))  # fmt: skip
            for name, path in (("pooled data", one), ("averaged clients", many)):
                lines[f"{_name(stop)}, {name}"] = _curve(path, rate)
        decayed = simulate_linear_simsiam(0.05, 0.3, LinearSimSiam(noise=pooled, weight_decay=0.25), rate=rate,
                                          steps=round(length / rate))  # fmt: skip
        lines["with, weight decay 0.25"] = _curve(decayed, rate)
        return Panel("time (steps times step size)", "mean |w| of the clients", lines, log_y=True,
                     title="trained predictors: where encoders go")  # fmt: skip

    def basins(self, starts: int) -> Outcome:
        """Which starts (w, p) collapse: the invariant's prediction for pooled data, and simulated averaged clients."""
        rng = seeds.stream(0, "study", "basins")
        w, p = rng.uniform(0.02, 1.0, starts), rng.uniform(-1.2, 1.2, starts)
        pooled = LinearSimSiam(noise=float(np.mean(self.noises)))
        invariant = w**2 - p**2 / pooled.predictor_rate
        limit = pooled.correlation**2 / pooled.predictor_rate
        predicted = (invariant <= -limit) | ((invariant < 0) & (p < 0))
        one = simulate_linear_simsiam(w, p, pooled, rate=0.02, steps=6000)[-2, :, 0]  # before the average at the end
        free = simulate_linear_simsiam(w, p, replace(pooled, stop_gradient=False), rate=0.02, steps=6000)[-2, :, 0]
        rows = [
            row("basins", "central", "with stop-gradient", "share of starts that collapse", (float(np.mean(c)), 0.0), e)
            for c, e in ((_dead(one), float(np.mean(predicted))),)
        ]
        rows.append(row("basins", "central", "without", "share of starts that collapse",
                        (float(np.mean(_dead(free))), 0.0), 1.0))  # fmt: skip
        shares = {}
        for time in (self.times[0], self.times[-2]):
            ends = []
            for a, b in zip(w, p, strict=True):
                steps = max(1, round(time / 0.05))
                path = simulate_linear_simsiam(a, b, self._clients(True), rate=0.05, steps=steps,
                                               rounds=max(1, 1600 // steps))  # fmt: skip
                ends.append(path[-1, 0, 0])
            dead = _dead(np.array(ends))
            shares[time] = (float(np.mean(dead)), float(np.mean(dead == predicted)))
            setting, place = f"with stop-gradient, T = {time:g}", f"{len(self.noises)} clients"
            found = (shares[time][0], 0.0)
            rows.append(row("basins", place, setting, "share of starts that collapse", found, float(predicted.mean())))
        agree = float(np.mean(_dead(one) == predicted))
        short, long = shares.values()
        finding = Finding(
            "T8: with a trained predictor w^2 - p^2 tells which starts collapse",
            agree > 0.95,
            f"right for {100 * agree:.0f} % of {starts} starts on pooled data ({100 * float(np.mean(predicted)):.0f} % "
            f"collapse; without stop-gradient {100 * float(np.mean(_dead(free))):.0f} %); of averaged clients "
            f"{100 * short[0]:.0f} % collapse after short and {100 * long[0]:.0f} % after long rounds, and the pooled "
            f"rule is right for {100 * short[1]:.0f} % and {100 * long[1]:.0f} %; holds means above 95 % on the pooled",
        )
        return Outcome(rows, {}, [finding])


def _dead(w: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(w) < 0.02)


def _curve(path: np.ndarray, rate: float) -> Line:
    """Mean |w| of the clients, thinned, down to 1e-4."""
    w = np.abs(path[:, :, 0]).mean(1)
    at: Sequence[int] = [i for i in range(0, len(w), 50) if w[i] > 1e-4]
    return Line([i * rate for i in at], [float(w[i]) for i in at])
