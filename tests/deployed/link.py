"""A Flower Grid that behaves as a SuperLink with SuperNodes does, in this process: every message goes through bytes.

Node ids are random and say nothing, contexts can be lost, nodes come and go, replies can be withheld or spoilt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedssl.config import Plan
from fedssl.flower.client_app import app
from fedssl.flower.server import federate
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

Spoil = Callable[[Message, Context, Message], Message | None]  # instruction, context, reply -> what arrives


def through_bytes(record: Any) -> Any:
    """What arrives on another machine."""
    objects = get_all_nested_objects(record)
    return inflate_object_from_contents(record.object_id, {key: value.deflate() for key, value in objects.items()})


class Link(Grid):
    """Nodes by id, each with its configuration; `spoil` sees every reply to an instruction to train."""

    def __init__(self, configs: Iterable[dict[str, Any]], spoil: Spoil | None = None, client: ClientApp = app) -> None:
        self.nodes: dict[int, Context] = {}
        self.online: set[int] = set()
        self.spoil, self._app = spoil, client
        self.sent: list[Message] = []
        self._waiting: dict[str, Message] = {}
        self._number = 0
        for config in configs:
            self.start(config)

    def start(self, config: dict[str, Any], node: int | None = None) -> int:
        """A SuperNode process begins, with nothing in its memory; returns its id."""
        node = node or 1_000_003 * (len(self.nodes) + 7) % 999_983 + 2
        self.nodes[node] = Context(1, node, dict(config), RecordDict(), {})
        self.online.add(node)
        return node

    def restart_all(self) -> None:
        """Every node's process is killed and begun again, under the same key."""
        for node, context in list(self.nodes.items()):
            self.start(dict(context.node_config), node)

    def of(self, client: int) -> Context:
        """The context of a client's node."""
        return next(c for c in self.nodes.values() if c.node_config["partition-id"] == client)

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            self._number += 1
            key = f"{self._number:08d}"
            message.metadata.__dict__["_message_id"] = key
            self.sent.append(message)
            self._waiting[key] = message
            keys.append(key)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for key in list(message_ids):
            message = self._waiting.pop(key, None)
            if message is not None and (reply := self._answer(message)) is not None:
                yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node not in self.online:
            return self._error(message, "Node Unavailable", 1)  # said by the SuperLink, whose id is 1
        context = self.nodes[node]
        there = Message(through_bytes(message.content), node, message.metadata.message_type)
        there.metadata.__dict__["_message_id"] = message.metadata.message_id
        try:
            reply = self._app(there, context)
        except Exception as error:  # noqa: BLE001  # as Flower's own runtimes do
            return self._error(message, f"{type(error)}:<'{error}'>", node)
        came: Message | None = Message(through_bytes(reply.content), reply_to=message)
        if self.spoil is not None and message.metadata.message_type == "train":
            came = self.spoil(message, context, cast(Message, came))
        return came

    def _error(self, message: Message, reason: str, node: int) -> Message:
        reply = Message(Error(0, reason), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


def configs(clients: int, **more: Any) -> list[dict[str, Any]]:
    """`--node-config` of so many nodes."""
    return [{"partition-id": client, **{k: v for k, v in more.items()}} for client in range(clients)]


def run_on(link: Link, plan: Plan) -> RunDirectory:
    """Run a plan on these nodes, as the ServerApp does."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    try:
        rundir = plan.open()
        federate(link, plan.job, rundir, Reporter(quiet=True))
        return rundir
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before
