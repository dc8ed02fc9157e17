"""Means over seeds with 95 % intervals of Student's t, and what they decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom; beyond the table the last one, which is wider.
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and the half-length of its 95 % interval, infinite for one value: it says nothing about the spread."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of independent values, such as those of seeds."""
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, math.inf)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
        return cls(mean, _QUANTILES[min(n - 1, len(_QUANTILES)) - 1] * deviation / math.sqrt(n))

    def above(self, level: float) -> bool | None:
        """Whether the whole interval lies above a level; False where it lies below, None where it holds the level."""
        if self.mean - self.half > level:
            return True
        return False if self.mean + self.half < level else None

    @property
    def bar(self) -> tuple[float, float]:
        """The mean and the half-length of an error bar; none for one value."""
        return self.mean, self.half if math.isfinite(self.half) else 0.0

    def text(self, scale: float = 1.0, digits: int = 3, sign: bool = False) -> str:
        """For a sentence: 0.812 ± 0.010; with `sign` +0.012 ± 0.010."""
        shown = f"{scale * self.mean:{'+' if sign else ''}.{digits}f}"
        return shown + (f" ± {scale * self.half:.{digits}f}" if math.isfinite(self.half) else "")


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of a minus b, paired by seed: both of a pair have the same split and the same initial weights."""
    return Interval.of([x - y for x, y in zip(a, b, strict=True)])


def both(verdicts: Sequence[bool | None]) -> bool | None:
    """Whether all hold: False if one does not, else None if one is undecided."""
    return False if False in verdicts else None if None in verdicts else True
