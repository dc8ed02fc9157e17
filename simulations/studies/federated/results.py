"""What a design has measured: every cell and measure by seed, as intervals, bars, lines and rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedssl.intervals import Interval, difference
from fedssl.report.charts import Line
from fedssl.rundir import RunDirectory
from simulations.studies.base import Bench, mean_and_deviation
from simulations.studies.federated.cells import Cell

Measures = Mapping[str, Sequence[float]]  # measure -> its value for each seed


@dataclass(frozen=True)
class Results:
    """(Cell or baseline) -> measures; a measure is absent where it makes no sense."""

    values: Mapping[Any, Measures]

    @classmethod
    def of(
        cls,
        bench: Bench,
        cells: Sequence[Cell],
        options: Callable[[Cell], Sequence[str]],
        seeds: int,
        measure: Callable[[RunDirectory], Mapping[str, float]],
    ) -> Results:
        """Run what is missing of every cell with seeds 0, 1, ..., and measure all."""
        found = {}
        for cell in cells:
            runs = [bench.pretrain(*options(cell), f"seed={seed}") for seed in range(seeds)]
            found[cell] = columns([measure(run) for run in runs])
        return cls(found)

    def interval(self, key: Any, measure: str) -> Interval:
        """The mean over seeds."""
        return Interval.of(self.values[key][measure])

    def gain(self, a: Any, b: Any, measure: str, other: str | None = None) -> Interval:
        """How much better a is than b, paired by seed; `other` is b's measure if it has another one."""
        return difference(self.values[a][measure], self.values[b][other or measure])

    def bars(self, keys: Mapping[str, Any], measure: str) -> dict[str, tuple[float, float]]:
        """For a panel: name -> (mean, half-length) of those keys that have the measure."""
        known = {name: key for name, key in keys.items() if measure in self.values.get(key, {})}
        return {name: self.interval(key, measure).bar for name, key in known.items()}

    def line(self, keys: Mapping[float, Any], measure: str) -> Line:
        """For a panel: a curve through these places, with intervals."""
        points = {x: self.interval(key, measure).bar for x, key in keys.items() if key in self.values}
        return Line(list(points), [mean for mean, _ in points.values()], [half for _, half in points.values()])

    def rows(self, part: str, place: Callable[[Any], str], setting: Callable[[Any], str]) -> list[dict[str, Any]]:
        """For the table, one row a measure."""
        return [
            row(part, place(key), setting(key), measure, values)
            for key, measures in self.values.items()
            for measure, values in measures.items()
        ]


def columns(each: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The measures of several seeds by measure; those that every seed has."""
    return {name: [float(one[name]) for one in each] for name in each[0] if all(name in one for one in each)}


def row(part: str, place: str, setting: str, measure: str, values: Sequence[float]) -> dict[str, Any]:
    """One row of a study's table; low and high are the ends of the 95 % interval, which one seed does not have."""
    mean, deviation = mean_and_deviation(values)
    interval = Interval.of(values)
    known = len(values) > 1
    return {
        "part": part,
        "place": place,
        "setting": setting,
        "measure": measure,
        "mean": mean,
        "deviation": deviation,
        "low": mean - interval.half if known else None,
        "high": mean + interval.half if known else None,
    }
