"""A Flower Grid whose nodes live in this process: no serialisation, no start-up, worker threads.

Flower's own records and apps are used unchanged. Replies are handed out one by one, in the order of the messages, so
that a strategy can consume and free them; at most `workers + 2` cohorts of them are ever waiting. The workers may be
processes of their own; what clients keep between rounds stays here all the same. Without a worker the thread that takes
the replies runs the clients.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # private: Message() outside a Flower runtime needs it

from fedssl.cohort.choice import Choice
from fedssl.errors import ProtocolError
from fedssl.flower.run.states import States
from fedssl.flower.workers.processes import WorkerDiedError, forked
from fedssl.flower.workers.threads import Call, Threads, Worker


class InProcessGrid(Grid):
    """Runs a ClientApp for virtual nodes 1 .. `nodes`; node k serves partition k - 1.

    Args:
        client_app: what the nodes run.
        nodes: their number.
        workers: threads that train; the result does not depend on it. 0: the thread that takes the replies trains, each
            cohort when it is asked for: there is nobody to wait for, or to pass Python's lock to.
        processes: whether each worker has a process of its own, forked when the grid is entered, and not only a thread.
        fail_fast: whether an exception in a client is raised again in the thread that pulls the replies; otherwise it
            becomes an error reply, as in Flower's own runtimes.
        choice: how many clients a worker trains at once; one after another unless it says otherwise.
        limit: bytes of the states of idle clients in memory; None keeps all there.
        folder: for those that do not fit.
        examples: how many examples a node's client has; clients with as many as others train with them.
        sites: the `data-dir` of each node, where nodes have data of their own.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        workers: int = 1,
        fail_fast: bool = True,
        choice: Choice | None = None,
        examples: Callable[[int], int] | None = None,
        limit: int | None = None,
        folder: Path | None = None,
        sites: Sequence[str] = (),
        processes: bool = False,
    ) -> None:
        self._app, self._nodes, self._workers, self._fail_fast = client_app, nodes, workers, fail_fast
        self._processes = processes
        self._choice, self._examples = choice or Choice(1, nodes), examples
        self._sites = sites
        self.states = States(self._make, limit, folder)
        self._messages: dict[str, Message] = {}
        self._sent = 0
        self._run: Run | None = None
        self._cohorts: queue.SimpleQueue[list[Call] | None] = queue.SimpleQueue()
        self._crew: Sequence[Worker] = ()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> InProcessGrid:
        self._identity = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        took = self._choice.took
        # Before there are threads, which a fork would lose with the locks that they hold.
        self._crew = (
            forked(self._workers, self._app, took)
            if self._processes
            else [Threads(self._app, took) for _ in range(max(1, self._workers))]
        )
        if self._workers:
            # Daemons, so that an interrupted run does not wait for the clients that are still training.
            self._threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in self._crew]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(queue.Empty):
            while True:  # clients that nobody waits for any more
                self._cohorts.get_nowait()
        for _thread in self._threads:
            self._cohorts.put(None)
        if not self._threads:
            for worker in self._crew:
                worker.close()
        if kind is None or issubclass(kind, Exception):  # not on ctrl-C: the person should not wait for the clients
            for thread in self._threads:
                thread.join()
        else:
            for worker in self._crew:
                worker.stop()
        self._threads, self._crew = [], ()
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = self._identity

    def _work(self, worker: Worker) -> None:
        while (calls := self._cohorts.get()) is not None:
            worker.run(calls)
            del calls  # an idle worker must not keep its last replies alive
        worker.close()

    def context(self, node: int) -> Context:
        """The context of a node, made when it is first needed: a million idle nodes cost nothing."""
        return self.states.get(node)

    def _make(self, node: int) -> Context:
        config: dict[str, int | str] = {"partition-id": node - 1, "num-partitions": self._nodes}
        if self._sites:
            config["data-dir"] = self._sites[node - 1]
        return Context(
            run_id=1,
            node_id=node,
            node_config=cast(dict[str, bool | float | int | str], config),
            state=RecordDict(),
            run_config={},
        )

    @property
    def contexts(self) -> Mapping[int, Context]:
        """The contexts of the nodes that have been used and are in memory."""
        return self.states.live

    def set_run(self, run: Run) -> None:
        """Remember Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run, if one was set."""
        return cast(Run, self._run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes."""
        return range(1, self._nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; the clients run when their replies are pulled."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._messages[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the clients of these messages on the workers and yield their replies in the order of the ids."""
        if not self._crew:
            raise ProtocolError("this grid has no workers: use it inside `with InProcessGrid(...) as grid:`")
        todo = [self._messages.pop(key) for key in message_ids if key in self._messages]
        if self._examples is not None:
            sizes = {id(message): self._examples(message.metadata.dst_node_id) for message in todo}
            todo.sort(key=lambda message: sizes[id(message)])
        waiting: deque[list[Call]] = deque()
        while todo:
            size = self._choice.next(len(todo))
            calls = [Call(message, self.states.lend(message.metadata.dst_node_id)) for message in todo[:size]]
            del todo[:size]
            if not self._threads:
                self._crew[0].run(list(calls))
                yield from self._finish(calls)
                continue
            self._cohorts.put(list(calls))  # the worker's own: below, replies are let go one by one
            waiting.append(calls)
            if len(waiting) > self._workers + 1:
                yield from self._finish(waiting.popleft())
        while waiting:
            yield from self._finish(waiting.popleft())

    def _finish(self, calls: list[Call]) -> Iterator[Message]:
        while calls:
            call = calls.pop(0)
            call.wait()
            self.states.back(call.context.node_id)
            of_the_client = isinstance(call.failure, Exception) and not isinstance(call.failure, WorkerDiedError)
            if call.failure is None:
                yield cast(Message, call.reply)
            elif self._fail_fast or not of_the_client:
                raise call.failure
            else:
                yield Message(Error(code=0, reason=f"{type(call.failure)}:<'{call.failure}'>"), reply_to=call.message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the clients of these messages; `timeout` has no meaning in one process."""
        return self.pull_messages(self.push_messages(messages))
