"""A Flower Grid whose nodes live in this process: no serialisation, no start-up, worker threads.

Flower's own records and apps are used unchanged. Replies are handed out one by one, in the order of the messages, so
that a strategy can consume and free them; at most `workers + 2` are ever waiting.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # private: Message() outside a Flower runtime needs it

from fedssl.errors import ProtocolError


class _Call:
    """One client's turn, and the place where its result is awaited."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        self.reply: Message | None = None
        self.failure: BaseException | None = None
        self.finished = threading.Event()


class InProcessGrid(Grid):
    """Runs a ClientApp for virtual nodes 1 .. `nodes`; node k serves partition k - 1.

    With `fail_fast` an exception in a client is raised again in the thread that pulls the replies; otherwise it becomes
    an error reply, as in Flower's own runtimes.
    """

    def __init__(self, client_app: ClientApp, nodes: int, workers: int = 1, fail_fast: bool = True) -> None:
        self._app, self._nodes, self._workers, self._fail_fast = client_app, nodes, workers, fail_fast
        self._contexts: dict[int, Context] = {}
        self._messages: dict[str, Message] = {}
        self._sent = 0
        self._run: Run | None = None
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> InProcessGrid:
        self._identity = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        # Daemons, so that an interrupted run does not wait for the clients that are still training.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(queue.Empty):
            while True:  # clients that nobody waits for any more
                self._calls.get_nowait()
        for _thread in self._threads:
            self._calls.put(None)
        if kind is None or issubclass(kind, Exception):  # not on ctrl-C: the person should not wait for the clients
            for thread in self._threads:
                thread.join()
        self._threads = []
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = self._identity

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.reply = self._app(call.message, call.context)
            except BaseException as error:  # noqa: BLE001  # handed to the thread that waits for it
                call.failure = error
            call.finished.set()
            del call  # an idle worker must not keep its last reply alive

    def context(self, node: int) -> Context:
        """The context of a node, made when it is first needed: a million idle nodes cost nothing."""
        if node not in self._contexts:
            config = {"partition-id": node - 1, "num-partitions": self._nodes}
            self._contexts[node] = Context(
                run_id=1,
                node_id=node,
                node_config=cast(dict[str, bool | float | int | str], config),
                state=RecordDict(),
                run_config={},
            )
        return self._contexts[node]

    @property
    def contexts(self) -> dict[int, Context]:
        """The contexts of all nodes that have been used."""
        return self._contexts

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
        if not self._threads:
            raise ProtocolError("this grid has no workers: use it inside `with InProcessGrid(...) as grid:`")
        waiting: deque[_Call] = deque()
        todo = [self._messages.pop(key) for key in message_ids if key in self._messages]
        for message in todo:
            call = _Call(message, self.context(message.metadata.dst_node_id))
            self._calls.put(call)
            waiting.append(call)
            if len(waiting) > self._workers + 1:
                yield self._finish(waiting.popleft())
        while waiting:
            yield self._finish(waiting.popleft())

    def _finish(self, call: _Call) -> Message:
        # Wakes up now and then: a wait without a limit would swallow ctrl-C on some platforms.
        while not call.finished.wait(timeout=1.0):
            pass
        if call.failure is not None:
            if self._fail_fast:
                raise call.failure
            return Message(Error(code=0, reason=f"{type(call.failure)}:<'{call.failure}'>"), reply_to=call.message)
        return cast(Message, call.reply)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the clients of these messages; `timeout` has no meaning in one process."""
        return self.pull_messages(self.push_messages(messages))
