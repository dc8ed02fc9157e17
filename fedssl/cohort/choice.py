"""How many clients of a round train at once: as told, or whatever has been measured to be the fastest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

CANDIDATES = (32, 8, 1)
_TURNS = 2  # of each candidate: its first one pays for what is made once


class Choice:
    """Gives the size of the next cohort, and learns from how long cohorts take.

    Args:
        size: of every cohort; None: try each candidate twice, then keep to the one with the shortest time for a
            client's step.
        most: no larger than this, for no more clients take part in a round.
        decided: called once, with the size and the seconds for a client's step of all candidates.
    """

    def __init__(
        self,
        size: int | None,
        most: int,
        decided: Callable[[int, Mapping[int, float]], None] = lambda size, seconds: None,
    ) -> None:
        self._size, self._decided = size, decided
        self._candidates = [candidate for candidate in CANDIDATES if candidate <= most] or [1]
        self._trials = [] if size else self._candidates * _TURNS
        self._seconds: dict[int, list[float]] = {}
        self._lock = threading.Lock()

    def next(self, left: int) -> int:
        """The size of the next cohort, when so many clients are left."""
        with self._lock:
            if self._size is not None:
                return min(self._size, left)
            for trial in self._trials:
                if trial <= left:
                    self._trials.remove(trial)
                    return trial
            return min(self._best(), left)  # all trials are under way, or too large for those that are left

    def took(self, size: int, steps: int, seconds: float) -> None:
        """Learn how long a cohort of this size took for so many steps, those of all its clients counted."""
        with self._lock:
            if self._size is not None or not steps:
                return
            self._seconds.setdefault(size, []).append(seconds / steps)
            if any(len(self._seconds.get(candidate, ())) < _TURNS for candidate in self._candidates):
                return
            known = {candidate: min(self._seconds[candidate]) for candidate in self._candidates}
            self._size = min(known, key=lambda candidate: known[candidate])
        self._decided(self._size, known)

    def _best(self) -> int:
        return min(self._seconds, key=lambda size: min(self._seconds[size]), default=1)
