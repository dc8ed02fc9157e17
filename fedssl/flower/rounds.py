"""One round on any Flower grid: who is there, what came back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedssl import tree
from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.in_process import InProcessGrid
from fedssl.parts import Arrays


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
            arrays = codec.decode(content.array_records[codec.ARRAYS])
            packed = pack(arrays)
            if packed is not arrays:
                content[codec.ARRAYS] = codec.encode(packed)
            sizes[id(content)] = tree.size_bytes(packed)
        total += sizes[id(content)]
    return total


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[Message]:
    """Send messages and yield the replies as they arrive; those that miss the deadline are not yielded.

    Unlike `Grid.send_and_receive`, which returns when all are there, this lets the caller free each reply.
    """
    deadline, pause = time.monotonic() + timeout_s, 0.01
    waiting = set(grid.push_messages(messages))
    while waiting and time.monotonic() < deadline:
        before = len(waiting)
        # In the order of sending, so that a grid of this process starts the clients in that order.
        for reply in grid.pull_messages(sorted(waiting, key=lambda key: (len(key), key))):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        pause = 0.01 if len(waiting) < before else min(0.5, pause * 1.5)
        if waiting:
            time.sleep(pause)


@dataclass(frozen=True)
class _InOrder(Mapping[int, int]):
    """Node k serves partition k - 1; holds no table."""

    clients: int

    def __getitem__(self, client: int) -> int:
        if not 0 <= client < self.clients:
            raise KeyError(client)
        return client + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.clients))

    def __len__(self) -> int:
        return self.clients


def roster(grid: Grid, clients: int, timeout_s: float) -> Mapping[int, int]:
    """Which node serves which partition: {partition: node id}.

    Node ids are random outside this process, so the nodes are asked.

    Raises:
        ProtocolError: not all partitions 0 .. clients - 1 have a node in time.
    """
    if isinstance(grid, InProcessGrid):
        return _InOrder(clients)
    found: dict[int, int] = {}
    asked: set[int] = set()
    deadline, pause = time.monotonic() + min(timeout_s, 120.0), 0.05
    while time.monotonic() < deadline:
        new = [node for node in grid.get_node_ids() if node not in asked]
        asked.update(new)
        for reply in exchange(grid, [Message(RecordDict(), n, MessageType.QUERY) for n in new], timeout_s):
            if reply.has_content():
                partition = cast(int, reply.content.metric_records[codec.METRICS]["partition-id"])
                found[int(partition)] = reply.metadata.src_node_id
        if all(partition in found for partition in range(clients)):
            return {partition: found[partition] for partition in range(clients)}
        if not new:
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)
    missing = [p for p in range(clients) if p not in found]
    raise ProtocolError(
        f"{len(missing)} of {clients} clients have no node (the first is partition {missing[0]}): start more nodes "
        "(--federation-config 'num-supernodes=...') or lower federation.clients"
    )


@dataclass
class Tally:
    """What came back in a round: rows for the logs, failures, and the clients' encoders where they are measured."""

    expected: list[int]
    tolerate: int
    now: Arrays
    partition_of: Mapping[int, int]  # node id -> partition
    keep: Callable[[int, Arrays], None]  # called with every client's arrays, before they are freed
    moved: Callable[[int, Arrays], None] = lambda client, arrays: None  # and with those that are merged, if others
    lacking: Callable[[int], Collection[str]] = lambda client: ()  # names that a client leaves out of its update
    unpack: Callable[[Arrays, Arrays, str], Arrays] = lambda wire, asked, who: wire  # a client's arrays from the wire's
    began: Mapping[int, Arrays] = field(default_factory=dict)  # the models of those that began with another than `now`
    each: bool = True  # whether every update is an ordinary one; else replies are passed on unread, and say who came
    bytes_down: int = 0
    rows: list[dict[str, float | int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    updates: int = 0  # passed on

    def watch(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Pass good updates on and count the others; a client that had no time for a step has a row and no update.

        Raises:
            ProtocolError: an update that does not fit the model, or more failures than are tolerated.
        """
        failed: set[int] = set()
        for reply in replies:
            if reply.has_error():
                self.failures.append(reason(reply.error.reason))
                failed.add(self.partition_of.get(reply.metadata.src_node_id, -1))
                self._judge()
                continue
            client = self.partition_of.get(reply.metadata.src_node_id, -1)
            if not self.each:
                sent = codec.decode(reply.content.array_records[codec.ARRAYS])
                found = reply.content.metric_records[codec.METRICS].items()
                said = {key: cast(float, value) for key, value in found if key != "partition-id"}
                self.rows.append({"client": client, **said, "bytes_up": tree.size_bytes(sent)})
                self.updates += 1
                yield reply
                continue
            records = reply.content.metric_records
            if codec.ARRAYS not in reply.content.array_records or codec.WEIGHT not in records.get(codec.METRICS, {}):
                raise ProtocolError(
                    f"client {client} replied without {codec.ARRAYS!r} or {codec.WEIGHT!r}: "
                    "it does not run this ClientApp"
                )
            wire = codec.decode(reply.content.array_records[codec.ARRAYS])
            metrics = dict(reply.content.metric_records[codec.METRICS])
            trained = metrics.get("steps") != 0
            if trained:
                asked = self._asked(client)
                arrays = self.unpack(wire, asked, f"client {client}")
                tree.check_same(arrays, asked, f"client {client}")
                if arrays is not wire:  # no strategy sees compressed arrays
                    reply.content[codec.ARRAYS] = codec.encode(arrays)
                self.keep(client, arrays)
            self.rows.append(
                {
                    "client": client,
                    "examples": int(cast(int, metrics[codec.WEIGHT])),
                    **{k: cast(float, v) for k, v in metrics.items() if k not in (codec.WEIGHT, "partition-id")},
                    "bytes_up": tree.size_bytes(wire),
                }
            )
            if trained:
                self.updates += 1
                yield reply
        missing = sorted(set(self.expected) - {int(row["client"]) for row in self.rows} - failed)
        unnamed = len(self.failures) - len(failed - {-1})
        self.failures += [f"client {p} did not reply in time" for p in missing[unnamed:]]
        self._judge()
        self.rows.sort(key=lambda row: row["client"])

    def lose(self, failures: Iterable[str]) -> None:
        """Count clients that failed before they were to train.

        Raises:
            ProtocolError: they are more than are tolerated.
        """
        self.failures += failures
        self._judge()

    def _asked(self, client: int) -> Arrays:
        lacking = self.lacking(client)
        return {key: value for key, value in self.began.get(client, self.now).items() if key not in lacking}

    def _judge(self) -> None:
        if len(self.failures) > self.tolerate:
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
