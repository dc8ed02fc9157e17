"""One round on any Flower grid: who is there, what came back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedssl import tree
from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.run.admission import admit, named, numbers, read
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


@dataclass
class Tally:
    """What came back in a round: rows for the logs, failures, and the clients' encoders where they are measured."""

    expected: list[int]
    tolerate: int | None  # None: any number
    now: Arrays
    partition_of: Mapping[int, int]  # node id -> partition
    keep: Callable[[int, Arrays], None]  # called with every client's arrays, before they are freed
    moved: Callable[[int, Arrays], None] = lambda client, arrays: None  # and with those that are merged, if others
    lacking: Callable[[int], Collection[str]] = lambda client: ()  # names that a client leaves out of its update
    unpack: Callable[[Arrays, Arrays, str], Arrays] = lambda wire, asked, who: wire  # a client's arrays from the wire's
    began: Mapping[int, Arrays] = field(default_factory=dict)  # the models of those that began with another than `now`
    each: bool = True  # whether every update is an ordinary one; else replies are passed on unread, and say who came
    max_change: float | None = None  # L2 norm of what an update may differ
    bytes_down: int = 0
    rows: list[dict[str, float | int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)  # those whose client is known
    updates: int = 0  # passed on

    def watch(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Pass good updates on and count the others; a client that had no time for a step has a row and no update.

        Raises:
            ProtocolError: more failures than are tolerated; an update that does not fit the model is one.
        """
        for reply in replies:
            client = self.partition_of.get(reply.metadata.src_node_id, -1)
            try:
                if reply.has_error():
                    raise ProtocolError(reason(reply.error.reason))
                passed = self._read(reply, client)
            except ProtocolError as error:
                self.refuse(client, str(error))
                continue
            if passed:
                self.updates += 1
                yield reply
        missing = sorted(set(self.expected) - {int(row["client"]) for row in self.rows} - self.failed.keys())
        unnamed = len(self.failures) - len(self.failed)
        for client in missing[unnamed:]:
            self._note(client, f"client {client} did not reply in time")
        self._judge()
        self.rows.sort(key=lambda row: row["client"])

    def refuse(self, client: int, sentence: str) -> None:
        """Count a client as failed; what it has sent, if anything, is not used.

        Raises:
            ProtocolError: these are more failures than are tolerated.
        """
        if any(row["client"] == client for row in self.rows):  # it was passed on, and found wanting there
            self.rows = [row for row in self.rows if row["client"] != client]
            self.updates -= 1
        self._note(client, named(sentence, client))
        self._judge()

    def lose(self, failures: Mapping[int, str]) -> None:
        """Count clients that failed before they were to train.

        Raises:
            ProtocolError: they are more than are tolerated.
        """
        for client, sentence in failures.items():
            self._note(client, sentence)
        self._judge()

    def _read(self, reply: Message, client: int) -> bool:
        """Make the row of a reply, and put its arrays into it as strategies read them; whether there are any."""
        if not self.each:
            said = numbers(reply, client)
            sent = read(reply, client, tree.size_bytes(self.now))
            del said["partition-id"]
            self.rows.append({"client": client, **said, "bytes_up": tree.size_bytes(sent)})
            return True
        found = admit(reply, client, self._asked(client), self.unpack, self.max_change)
        if found.arrays is not None:
            if found.packed:  # no strategy sees compressed arrays
                reply.content[codec.ARRAYS] = codec.encode(found.arrays)
            self.keep(client, found.arrays)
        self.rows.append(found.row)
        return found.arrays is not None

    def _asked(self, client: int) -> Arrays:
        lacking = self.lacking(client)
        return {key: value for key, value in self.began.get(client, self.now).items() if key not in lacking}

    def _note(self, client: int, sentence: str) -> None:
        self.failures.append(sentence)
        if client >= 0:
            self.failed[client] = sentence

    def _judge(self) -> None:
        if self.tolerate is not None and len(self.failures) > self.tolerate:
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            raise ProtocolError(
                f"{self.failures[0]}{more}; federation.tolerate={self.tolerate} ends the run here, "
                "`fedssl resume` continues it from the last checkpoint"
            )

    def means(self, keys: Iterable[str]) -> dict[str, float]:
        """Means of metrics over the clients that report them, weighted by examples; those of nobody are absent."""
        found = {}
        for key in keys:
            rows = [row for row in self.rows if key in row]
            if rows:
                found[key] = float(sum(r["examples"] * r[key] for r in rows) / sum(r["examples"] for r in rows))
        return found


def reason(text: str | None) -> str:
    """The sentence inside an error that has passed through Flower's and Ray's wrappers."""
    for line in reversed((text or "").strip().splitlines()):
        line = line.strip()
        if line:
            match = re.fullmatch(r"<class '[\w.]+'>:<'(.*)'>", line)
            return match[1] if match else line.strip("<>'\" ").removeprefix("fedssl.errors.")
    return "a client failed without a reason"
