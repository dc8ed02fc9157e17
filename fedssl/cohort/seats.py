"""Where clients that train at the same time meet: each has a thread, and one of them takes the steps of all.

Only one of these threads runs at a time. They share a core, and what they do around the steps is short calls of torch,
each of which lets go of Python's lock: sixteen threads that pass it on take longer than one after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar


class Runs(Protocol):
    """A client's round of training that is ready for its first step."""

    def run(self) -> None:
        """Take all its steps."""
        ...


R = TypeVar("R", bound=Runs)


class Meeting(Generic[R]):
    """A cohort's seats. The last client to sit down trains all, the others wait; one that leaves is not waited for.

    Args:
        seats: how many threads will sit down, or leave without.
        train: takes all steps of the clients that are there, and returns what each of them raised.
    """

    def __init__(self, seats: int, train: Callable[[list[R]], Sequence[BaseException | None]]) -> None:
        self._missing, self._train = seats, train
        self._there: list[tuple[int, R]] = []
        self._lock, self._over = threading.Lock(), threading.Event()
        self.floor = threading.Lock()  # held by the thread that runs
        self._failures: dict[int, BaseException | None] = {}
        self._origins: dict[int, TracebackType | None] = {}
        self._stopped = False

    def sit(self, seat: int, runs: R) -> None:
        """Wait until this client has been trained, by this thread or another; the others run meanwhile.

        Raises:
            BaseException: whatever this client's training raised.
        """
        with self._lock:
            self._there.append((seat, runs))
        self.floor.release()
        try:
            self._arrived()
            while not self._over.wait(timeout=1.0):  # so that ctrl-C is heard
                pass
        finally:
            self.floor.acquire()
        if self._stopped:
            raise KeyboardInterrupt
        failure = self._failures[seat]
        if failure is not None:
            raise failure.with_traceback(self._origins[seat])  # seats that raise the same would add theirs to it

    def leave(self) -> None:
        """To be called by a thread that will not sit down: it failed before, or has nothing to train."""
        self._arrived()

    def stop(self) -> None:
        """Train nobody: who is there or comes raises KeyboardInterrupt."""
        self._stopped = True
        self._over.set()

    def _arrived(self) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing or self._stopped:
                return
        there = sorted(self._there, key=lambda one: one[0])  # the result does not depend on who sat down first
        try:
            failures = self._train([runs for _, runs in there]) if there else []
        except BaseException as error:  # noqa: BLE001  # raised again in every seat
            failures = [error] * len(there)
        self._failures = {seat: failure for (seat, _), failure in zip(there, failures, strict=True)}
        self._origins = {seat: failure.__traceback__ for seat, failure in self._failures.items() if failure is not None}
        self._over.set()


class _Seat(threading.local):
    meeting: Meeting[Any] | None = None
    number: int = 0


_seat = _Seat()


@contextmanager
def seat(meeting: Meeting[Any], number: int) -> Iterator[None]:
    """Give this thread a seat, and the floor: the next `take` in it trains with the others."""
    _seat.meeting, _seat.number = meeting, number
    try:
        with meeting.floor:
            yield
    except KeyboardInterrupt:  # of the main thread, which may be the last that the others wait for
        meeting.stop()
        raise
    finally:
        left, _seat.meeting = _seat.meeting, None
        if left is not None:  # it never sat down
            left.leave()


def take(runs: Runs) -> None:
    """Take all steps of a client's round: with its cohort if this thread has a seat in one, alone otherwise."""
    meeting, _seat.meeting = _seat.meeting, None
    if meeting is None:
        runs.run()
    else:
        meeting.sit(_seat.number, runs)
