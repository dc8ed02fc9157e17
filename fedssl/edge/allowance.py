"""The seconds that a device's owner gives a round, and how many steps fit into them."""

from __future__ import annotations

import math
import time


class Allowance:
    """The time of one round, which begins when this is made. A round takes one step at least.

    Args:
        seconds: > 0, until its last step has ended.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._began = seconds, time.monotonic()
        self._stepped = self._began

    @property
    def left(self) -> float:
        """Seconds; negative if it is over."""
        return self._began + self._seconds - time.monotonic()

    def begin(self) -> None:
        """The first step begins."""
        self._stepped = time.monotonic()

    def another(self) -> bool:
        """Whether one more step fits, if it takes as long as the one that has just ended."""
        now = time.monotonic()
        took, self._stepped = now - self._stepped, now
        return took <= self._began + self._seconds - now

    def share(self, steps: int, step_seconds: float | None) -> float:
        """The share of a round of so many steps that fits into what is left, in [1 / steps, 1].

        Args:
            steps: of the whole round.
            step_seconds: of one, as an earlier round has measured it; None: one step is taken, to know.
        """
        fit = 1 if step_seconds is None else math.floor(self.left / max(step_seconds, 1e-9))
        return min(max(fit, 1), steps) / steps
