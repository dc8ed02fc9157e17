"""Messages on any Flower grid: the chosen nodes, instructions to them, replies as they arrive."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedssl import tree
from fedssl.flower import codec
from fedssl.parts import Arrays

_SKEW_S = 330.0  # how far Flower lets the clocks of nodes differ, and some more


class CohortGrid(Grid):
    """A grid that shows only the chosen nodes.

    Flower's own strategies draw their nodes from the global generator; asked for all nodes of this grid they have no
    choice left, so any of them becomes reproducible.
    """

    def __init__(self, grid: Grid, nodes: list[int]) -> None:
        self._grid, self._nodes = grid, nodes

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The chosen nodes, in order of their partitions."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        return self._grid.send_and_receive(messages, timeout=timeout)


def instruct(messages: Iterable[Message], pack: Callable[[Arrays], Arrays]) -> int:
    """Pack the arrays of each instruction, once where messages share them; returns the bytes of all of them."""
    sizes: dict[int, int] = {}
    total = 0
    for message in messages:
        content = message.content
        if id(content) not in sizes:
            arrays = codec.decode(codec.arrays_of(content))
            packed = pack(arrays)
            if packed is not arrays:
                content[codec.ARRAYS] = codec.encode(packed)
            sizes[id(content)] = tree.size_bytes(packed)
        total += sizes[id(content)]
    return total


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[Message]:
    """Send messages and yield the replies as they arrive; those that miss the deadline are not yielded.

    Unlike `Grid.send_and_receive`, which returns when all are there, this lets the caller free each reply. A reply
    counts once, for the instruction that it answers, and in the name of the node that was asked: a SuperLink answers
    for a node that is gone. Instructions expire soon after the deadline, so that a slow node never works off old ones.
    """
    deadline, pause = time.monotonic() + timeout_s, 0.01
    messages = list(messages)
    for message in messages:
        message.metadata.ttl = timeout_s + _SKEW_S
    asked = {
        key: message.metadata.dst_node_id for key, message in zip(grid.push_messages(messages), messages, strict=False)
    }
    del messages
    waiting = {key for key in asked if key}  # a SuperLink that does not take a message gives it no number
    while waiting and time.monotonic() < deadline:
        before = len(waiting)
        # In the order of sending, so that a grid of this process starts the clients in that order.
        for reply in grid.pull_messages(sorted(waiting, key=lambda key: (len(key), key))):
            key = reply.metadata.reply_to_message_id
            if key not in waiting:
                continue
            waiting.discard(key)
            reply.metadata.__dict__["_src_node_id"] = asked[key]
            yield reply
        pause = 0.01 if len(waiting) < before else min(0.5, pause * 1.5)
        if waiting:
            time.sleep(pause)


def reason(text: str | None) -> str:
    """The sentence inside an error that has passed through Flower's and Ray's wrappers."""
    for line in reversed((text or "").strip().splitlines()):
        line = line.strip()
        if line:
            match = re.fullmatch(r"<class '[\w.]+'>:<'(.*)'>", line)
            return match[1] if match else line.strip("<>'\" ").removeprefix("fedssl.errors.")
    return "a client failed without a reason"
