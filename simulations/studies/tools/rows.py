"""What studies make tables, curves and sentences of: means and deviations over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedssl.report.charts import Line
from simulations.studies.base import Outcome, mean_and_deviation

Row = dict[str, Any]
Stat = tuple[float, float]  # mean and standard deviation over seeds


def row(part: str, place: str, setting: str, measure: str, found: Stat, expected: float | None = None) -> Row:
    """One row of any study's table.

    Args:
        part: of the study.
        place: where it was measured: central, or which clients.
        setting: what was varied, with its value.
        measure: what was measured, with its unit.
        found: its mean and deviation; the deviation of one value is 0.
        expected: what the theory says, where it gives a number.
    """
    return {
        "part": part,
        "place": place,
        "setting": setting,
        "measure": measure,
        "mean": found[0],
        "deviation": found[1],
        "expected": expected,
    }


def over_seeds(measure: Callable[[int], float], count: int) -> Stat:
    """A measure for each seed from 0 on."""
    return mean_and_deviation([measure(seed) for seed in range(count)])


def stats(repetitions: Sequence[Sequence[float]]) -> list[Stat]:
    """Mean and deviation of each column."""
    return [mean_and_deviation(column) for column in zip(*repetitions, strict=True)]


def line(x: Sequence[float], found: Sequence[Stat]) -> Line:
    """A curve with the deviation as bars, where there is one."""
    deviations = [deviation for _, deviation in found]
    return Line(list(x), [mean for mean, _ in found], deviations if any(deviations) else None)


def pair(found: Stat, digits: int = 3) -> str:
    """Mean and deviation for a sentence: 0.812 ± 0.010; one seed has no deviation."""
    return f"{found[0]:.{digits}f}" + (f" ± {found[1]:.{digits}f}" if found[1] else "")


def apart(a: Stat, b: Stat) -> bool | None:
    """Whether a lies above b by more than both deviations together; None where they overlap or no spread is known."""
    gap, spread = a[0] - b[0], a[1] + b[1]
    if spread == 0.0:
        return None
    return gap > 0 if abs(gap) > spread else None


def joined(parts: Sequence[Outcome]) -> Outcome:
    """Several outcomes as one."""
    return Outcome(
        [row for part in parts for row in part.table],
        {name: panels for part in parts for name, panels in part.charts.items()},
        [finding for part in parts for finding in part.findings],
    )
