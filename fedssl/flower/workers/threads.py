"""What runs the turns of clients: a worker that the grid gives one cohort after another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedssl.client import Training
from fedssl.cohort.seats import Meeting, seat
from fedssl.cohort.together import train_together

Took = Callable[[int, int, float], None]  # told of each cohort: its clients, the steps of all of them, seconds


class Call:
    """One client's turn, and the place where its result is awaited."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        self.reply: Message | None = None
        self.failure: BaseException | None = None
        self.finished = threading.Event()

    def wait(self) -> None:
        """Wait for the result; wakes up now and then, or ctrl-C would be lost on some platforms."""
        while not self.finished.wait(timeout=1.0):
            pass


class Worker(Protocol):
    """Runs the turns of one cohort at a time."""

    def run(self, calls: Sequence[Call]) -> None:
        """Run these clients' turns, their training as one cohort, and finish each call."""
        ...

    def close(self) -> None:
        """Free what it holds; it runs nothing more."""
        ...

    def stop(self) -> None:
        """Leave what is under way, as far as that is possible."""
        ...


class Threads:
    """A worker of this process: the thread that calls leads, others sit down with it where several train at once."""

    def __init__(self, client_app: ClientApp, took: Took) -> None:
        self._app, self._took = client_app, took
        self._others: list[queue.SimpleQueue[Callable[[], None] | None]] = []

    def run(self, calls: Sequence[Call]) -> None:
        """See `Worker`."""
        meeting: Meeting[Training] = Meeting(len(calls), self._train)
        while len(self._others) < len(calls) - 1:
            self._others.append(queue.SimpleQueue())
            threading.Thread(target=_serve, args=(self._others[-1],), daemon=True).start()
        for number, call in enumerate(calls[1:], 1):
            self._others[number - 1].put(partial(self._turn, meeting, number, call))
        self._turn(meeting, 0, calls[0])
        if isinstance(calls[0].failure, KeyboardInterrupt):  # this is the main thread: nobody waits for the others
            return
        for call in calls:
            call.wait()

    def close(self) -> None:
        """Let the threads end."""
        for other in self._others:
            other.put(None)

    def stop(self) -> None:
        """Nothing: threads cannot be stopped, and these do not keep the process alive."""

    def _turn(self, meeting: Meeting[Training], number: int, call: Call) -> None:
        try:
            with seat(meeting, number):
                call.reply = self._app(call.message, call.context)
        except BaseException as error:  # noqa: BLE001  # handed to the thread that waits for it
            call.failure = error
        call.finished.set()

    def _train(self, trainings: Sequence[Training]) -> Sequence[BaseException | None]:
        began = time.perf_counter()
        failures = train_together(trainings)
        self._took(len(trainings), sum(one.done for one in trainings), time.perf_counter() - began)
        return failures


def _serve(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # an idle thread must not keep its last reply alive
