"""The server's questions in secure aggregation, on any Flower grid."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import ProtocolError
from fedssl.flower.rounds import exchange
from fedssl.flower.secagg import records
from fedssl.flower.secagg.records import SECAGG
from fedssl.privacy.secagg import collector
from fedssl.privacy.secagg.participant import Advert, Session


@dataclass
class Exchange:
    """One secure aggregation: who takes part, and the sum of what has come.

    Attributes:
        grid: the nodes.
        nodes: of the clients that are asked, by client.
        session: see `Session`.
        timeout_s: for the answers to one question.
    """

    grid: Grid
    nodes: Mapping[int, int]
    session: Session
    timeout_s: float
    roster: dict[int, Advert] = field(default_factory=dict)
    letters: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by recipient, then sender
    survivors: list[int] = field(default_factory=list)
    total: np.ndarray | None = None

    @classmethod
    def open(cls, grid: Grid, nodes: Mapping[int, int], name: str, threshold: int, timeout_s: float) -> Exchange:
        """Steps 1 and 2: let the clients exchange keys and shares.

        Args:
            grid: see the attributes.
            nodes: likewise.
            name: of the run and the round; a repeated round is another session all the same.
            threshold: clients that must survive.
            timeout_s: see the attributes.

        Raises:
            ProtocolError: too few clients answer.
        """
        new = cls(grid, nodes, Session(name.encode() + b" " + os.urandom(16), threshold), timeout_s)
        for client, record in new._ask("secagg_advertise", nodes, {}):
            said = records.roster_of(record)
            if said.keys() != {client}:
                raise ProtocolError(f"client {client} sent keys of others: it runs another protocol, leave it out")
            new.roster |= said
        collector.enough(new.roster, new.session, "sent their keys")
        content = {**records.session(new.session), **records.roster(new.roster)}
        sent = {c: records.table_of(record, "letters") for c, record in new._ask("secagg_share", new.roster, content)}
        collector.enough(sent, new.session, "shared their secrets")
        new.letters = collector.deliver(sent)
        return new

    def instruct(self, message: Message, client: int) -> None:
        """Add to a client's training instruction what it needs to hide its update."""
        told = {"asked": len(self.nodes), **records.table("letters", self.letters[client])}
        message.content = RecordDict({**message.content, SECAGG: ConfigRecord(told)})

    def add(self, client: int, masked: np.ndarray) -> None:
        """Step 3: add a masked vector; it can be freed then.

        Raises:
            ProtocolError: it has another size or type than those before.
        """
        if self.total is None:
            self.total = masked.copy()
        elif (masked.shape, masked.dtype) == (self.total.shape, self.total.dtype):
            self.total += masked
        else:
            raise ProtocolError(
                f"client {client} sent {masked.size} numbers of {masked.dtype} and others sent {self.total.size} of "
                f"{self.total.dtype}: it has another model or other options"
            )
        self.survivors.append(client)

    def close(self) -> np.ndarray:
        """Step 4: the sum of the survivors' vectors.

        Raises:
            ProtocolError: too few clients are left, or one answers wrongly.
        """
        collector.enough(self.survivors, self.session, "sent their masked vectors")
        content = {"survivors": sorted(self.survivors)}
        answers = self._ask("secagg_reveal", self.survivors, content)
        reveals = {client: records.reveal_of(record) for client, record in answers}
        total = np.zeros(0, np.uint32) if self.total is None else self.total
        return collector.unmask(self.session, self.roster, self.letters.keys(), total, self.survivors, reveals)

    def _ask(self, step: str, clients: Collection[int], content: dict[str, Any]) -> Iterator[tuple[int, Any]]:
        """The answers, by client; one that fails or is silent has dropped out."""
        client_of = {self.nodes[client]: client for client in sorted(clients)}
        question = RecordDict({SECAGG: ConfigRecord(content)})
        messages = [Message(question, node, f"query.{step}") for node in client_of]
        for reply in exchange(self.grid, messages, self.timeout_s):
            if reply.has_content():
                yield client_of[reply.metadata.src_node_id], reply.content.config_records[SECAGG]
