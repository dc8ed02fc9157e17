"""T9: the EMA teacher as an average of past students, its lag, its schedule, and where it lives between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedssl.report.charts import Line, Panel
from fedssl.rundir import RunDirectory
from fedssl.theory import ema_window
from simulations.studies.base import Bench, Finding, Outcome, check, mean_and_deviation
from simulations.studies.tools.rows import Stat, apart, joined, line, pair, row, stats
from simulations.studies.tools.runs import Finished, by_round
from simulations.studies.tools.sweeps import Sweep, places, quality, untrained
from simulations.studies.tools.teachers import Path

WATCHED = ("method=byol", "method._target_=simulations.studies.tools.teachers.WatchedBYOL")
SCHEDULES = ("constant", "cosine", "adaptive")
SHARES = ("derived", "local", "merge")
HOME = "strategy.share.teacher"
AGE, EXPECTED_AGE = "age of the nearest student", "mean age of the weights (closed form)"
DISTANCE, INDEPENDENT = "distance in lengths of a step", "the same if steps were independent"
_CURVES = (AGE, EXPECTED_AGE, DISTANCE, INDEPENDENT)
ACCURACY, LAG = "accuracy, 5 labels a class", "lag, mean of the rounds"


@dataclass(frozen=True)
class Teacher:
    """Closed form and lag of BYOL's teacher, then schedules and homes of it by probe accuracy.

    Args:
        tiny: everything smaller, the whole in under a minute.
        seeds: repetitions, 1 or more.
        decays: m.
        epochs: of the recorded trainings, 20 steps each.
        clients: of the federated runs.
        alpha: label skew, Dir(alpha).
        rounds: of all runs.
        batch_size: small, so that clients take many steps.
    """

    tiny: bool = False
    seeds: int = 3
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    epochs: int = 15
    clients: int = 5
    alpha: float = 0.1
    rounds: int = 10
    batch_size: int = 32

    def __post_init__(self) -> None:
        check(self)

    def run(self, bench: Bench) -> Outcome:
        """Measure all parts."""
        small: dict[str, Any] = {
            "seeds": 1,
            "decays": self.decays[::2],
            "epochs": min(3, self.epochs),
            "rounds": min(3, self.rounds),
        }
        sized = replace(self, **small) if self.tiny else self
        return joined([sized._closed_form(bench), sized._schedules(bench), sized._homes(bench)])

    @property
    def _common(self) -> tuple[str, ...]:
        return (*WATCHED, f"federation.rounds={self.rounds}", f"local.batch_size={self.batch_size}")

    def _closed_form(self, bench: Bench) -> Outcome:
        """Recorded students against recorded teachers."""
        rows, errors = [], []
        found: dict[str, list[list[float]]] = {name: [[] for _ in range(self.seeds)] for name in _CURVES}
        for decay in self.decays:
            bench.reporter.say(f"T9: record students and teachers, m = {decay:g}")
            paths = [Path.of(decay, self.epochs, seed) for seed in range(self.seeds)]
            errors += [path.error() for path in paths]
            for each, path in enumerate(paths):
                for name, value in zip(_CURVES, _measured(path), strict=True):
                    found[name][each].append(value)
            expected = {AGE: paths[0].expected_age(), DISTANCE: None}
            for name in (AGE, DISTANCE):
                values = mean_and_deviation([f[-1] for f in found[name]])
                rows.append(row("closed form", "central", f"m = {decay:g}", name, values, expected[name]))
        windows = [ema_window(decay) for decay in self.decays]
        curves = {name: stats(values) for name, values in found.items()}
        lines = {name: line(windows, values) for name, values in curves.items()}
        panel = Panel("window 1 / (1 - m) in steps", "steps", lines, log_x=True, log_y=True,
                      title=f"after {20 * self.epochs} steps at a constant learning rate")  # fmt: skip
        ages = [(a[0], b[0]) for a, b in zip(curves[AGE], curves[EXPECTED_AGE], strict=True)]
        ratios = [d[0] / a[0] for d, a in zip(curves[DISTANCE], curves[EXPECTED_AGE], strict=True)]
        walks = [d[0] / a[0] for d, a in zip(curves[DISTANCE], curves[INDEPENDENT], strict=True)]
        findings = [
            Finding(
                "T9: the teacher is the geometric average of past students",
                max(errors) < 1e-3,
                f"the closed form differs from {len(errors)} trained teachers by at most {max(errors):.1e} of the way "
                "that the teacher has gone; holds means below 0.001, float32's rounding adds up over the steps",
            ),
            Finding(
                "T9: the window 1 / (1 - m) tells how old the teacher is",
                all(abs(a / b - 1) < 0.3 for a, b in ages),
                "the student nearest to the teacher is "
                + ", ".join(
                    f"{a:.0f} steps old (mean age of the weights {b:.0f}, m = {m:g})"
                    for m, (a, b) in zip(self.decays, ages, strict=True)
                )
                + f" after {20 * self.epochs} steps; holds means within 30 %",
            ),
            Finding(
                "T9: the teacher's distance from the student grows with the window, as on a straight path",
                all(ratio > 0.7 for ratio in ratios),
                "in lengths of a step the distance is "
                + ", ".join(
                    f"{100 * r:.0f} % of a straight path's and {w:.1f} times that of independent steps (m = {m:g})"
                    for m, r, w in zip(self.decays, ratios, walks, strict=True)
                )
                + "; holds means above 70 % of the straight path's",
            ),
        ]
        return Outcome(rows, {"lag_and_window": [panel]}, findings)

    def _schedules(self, bench: Bench) -> Outcome:
        """Schedules by decays, teachers kept at home, centrally and with skewed clients."""
        where = places(self.clients, self.alpha)
        del where["IID clients"]
        settings = {
            f"{schedule}, m = {m:g}": (f"method.decay={m}", f"method.decay_schedule={schedule}", f"{HOME}=local")
            for schedule in SCHEDULES
            for m in self.decays
        }
        sweep = Sweep.of(bench, where, settings, self._common, self.seeds, _measure)
        start = untrained(bench, (*self._common, *next(iter(settings.values()))), self.seeds)
        panels = []
        for place in where:
            bars = {
                schedule: {f"m = {m:g}": sweep.stat(place, f"{schedule}, m = {m:g}", ACCURACY) for m in self.decays}
                for schedule in SCHEDULES
            }
            panels.append(Panel("decay at the start", "accuracy", bars=bars, title=f"{place}: 5 labels a class",
                                levels={"untrained encoder": start[ACCURACY][0]}))  # fmt: skip
        middle = self.decays[len(self.decays) // 2]
        lags = [
            Panel("communication round", "distance in weights",
                  {s: _lag(sweep.runs[place, f"{s}, m = {middle:g}"]) for s in SCHEDULES},
                  title=f"{place}: teacher from student, m = {middle:g}")
            for place in where
        ]  # fmt: skip
        findings = [self._adaptive(sweep, place) for place in where] + [self._long(sweep, place) for place in where]
        rows = [row("schedules", "before training", "untrained", name, found) for name, found in start.items()]
        charts = {"schedules": panels, "schedule_lag": lags}
        return Outcome([*sweep.rows("schedules"), *rows], charts, findings)

    def _adaptive(self, sweep: Sweep, place: str) -> Finding:
        each = {m: {s: sweep.stat(place, f"{s}, m = {m:g}", ACCURACY) for s in SCHEDULES} for m in self.decays}
        found = {m: apart(stat["adaptive"], max(stat["constant"], stat["cosine"])) for m, stat in each.items()}
        known = [value for value in found.values() if value is not None]
        return Finding(
            f"T9, {place}: a teacher that is faster where the loss is curved gives better features",
            None if len(known) < len(found) else True if all(known) else False if not any(known) else None,
            "5 labels a class, adaptive, constant and cosine: "
            + "; ".join(
                f"m = {m:g} " + ", ".join(pair(e[s]) for s in ("adaptive", "constant", "cosine"))
                for m, e in each.items()
            )
            + "; decided where at every m the difference to the better of the others exceeds both deviations",
        )

    def _long(self, sweep: Sweep, place: str) -> Finding:
        first, last = (sweep.stat(place, f"constant, m = {m:g}", ACCURACY) for m in (self.decays[0], self.decays[-1]))
        rounds = sweep.runs[place, f"constant, m = {self.decays[-1]:g}"][0].rows("clients.jsonl")
        steps = max(sum(r["steps"] for r in rounds if r["client"] == c) for c in {r["client"] for r in rounds})
        return Finding(
            f"T9, {place}: a longer window gives a steadier target and better features",
            apart(last, first),
            f"constant decay {self.decays[0]:g} gives {pair(first)} and {self.decays[-1]:g} gives {pair(last)} "
            f"(5 labels a class); a client takes at most {steps} steps in the whole run, and the longest window is "
            f"{ema_window(self.decays[-1]):.0f}",
        )

    def _homes(self, bench: Bench) -> Outcome:
        """Teachers that are rebuilt, kept or merged at each round; constant decay."""
        place = "skewed clients"
        settings = {
            f"{share}, m = {m:g}": (f"method.decay={m}", "method.decay_schedule=constant", f"{HOME}={share}")
            for share in SHARES
            for m in self.decays
        }
        where = {place: places(self.clients, self.alpha)[place]}
        sweep = Sweep.of(bench, where, settings, self._common, self.seeds, _measure)
        cells = {
            (share, m): sweep.stat(place, f"{share}, m = {m:g}", ACCURACY) for share in SHARES for m in self.decays
        }
        lags = {(share, m): sweep.stat(place, f"{share}, m = {m:g}", LAG) for share in SHARES for m in self.decays}
        last = self.decays[-1]
        panels = [
            Panel("decay", "accuracy", title=f"{place}: 5 labels a class",
                  bars={s: {f"m = {m:g}": cells[s, m] for m in self.decays} for s in SHARES}),
            Panel("communication round", "distance in weights", title=f"teacher from student, m = {last:g}",
                  lines={s: _lag(sweep.runs[place, f"{s}, m = {last:g}"]) for s in SHARES}),
        ]  # fmt: skip
        findings = [self._best_home(cells), self._bounded(sweep, place, lags)]
        return Outcome(sweep.rows("homes"), {"homes": panels}, findings)

    def _best_home(self, cells: Mapping[tuple[str, float], Stat]) -> Finding:
        gains = {m: apart(cells["local", m], cells["derived", m]) for m in self.decays}
        known = [gain for gain in gains.values() if gain is not None]
        return Finding(
            "T9 federated: a teacher that remembers earlier rounds (kept by its client) beats one rebuilt each round",
            None if len(known) < len(gains) else True if all(known) else False if not any(known) else None,
            "5 labels a class under label skew, rebuilt, kept and merged: "
            + "; ".join(f"m = {m:g} " + ", ".join(pair(cells[s, m]) for s in SHARES) for m in self.decays)
            + "; decided where at every m kept and rebuilt differ by more than both deviations",
        )

    def _bounded(self, sweep: Sweep, place: str, lags: Mapping[tuple[str, float], Stat]) -> Finding:
        m = self.decays[-1]
        rows = sweep.runs[place, f"derived, m = {m:g}"][0].rows("clients.jsonl")
        steps = max(int(row["steps"]) for row in rows)
        share = lags["derived", m][0] / lags["local", m][0]
        return Finding(
            "T9 federated: the window 1 / (1 - m) holds for a teacher that is rebuilt at each round",
            share > 0.5,
            f"a client takes at most {steps} steps a round, so at m = {m:g} the rebuilt teacher is at most {steps} "
            f"steps old instead of {ema_window(m):.0f}: its distance from the student is {pair(lags['derived', m], 2)},"
            f" {100 * share:.0f} % of the kept teacher's {pair(lags['local', m], 2)} (merged "
            f"{pair(lags['merge', m], 2)}); holds means more than half",
        )


def _measured(path: Path) -> tuple[float, ...]:
    return path.age(), path.expected_age(), path.lag(), path.expected_lag()


def _measure(run: RunDirectory) -> dict[str, float]:
    return {**quality(Finished.of(run)), LAG: float(np.mean(by_round(run, "lag")))}


def _lag(runs: Sequence[RunDirectory]) -> Line:
    found = stats([by_round(run, "lag") for run in runs])
    return line(range(1, len(found) + 1), found)
