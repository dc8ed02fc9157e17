"""What came back in a round: the updates, read and counted one by one, and who failed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from fedssl import tree
from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.exchange import reason
from fedssl.flower.run.admission import admit, named, numbers, read
from fedssl.parts import Arrays


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
