"""Rows of a study's table: a setting, where it was measured, mean and deviation over seeds, and what theory expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedssl.charts import Line
from simulations.studies.base import Outcome, mean_and_deviation

Row = dict[str, Any]
Stat = tuple[float, float]  # mean and standard deviation over seeds


def row(part: str, setting: str, of: str, at: float | str, found: Stat, expected: float | None = None) -> Row:
    """One row; `of` names the quantity that `at` is a value of."""
    return {
        "part": part,
        "setting": setting,
        "of": of,
        "at": at,
        "measured": found[0],
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
    """A curve with the deviation as bars."""
    return Line(list(x), [mean for mean, _ in found], [deviation for _, deviation in found])


def joined(parts: Sequence[Outcome]) -> Outcome:
    """Several outcomes as one."""
    return Outcome(
        [row for part in parts for row in part.table],
        {name: panels for part in parts for name, panels in part.charts.items()},
        [finding for part in parts for finding in part.findings],
    )
