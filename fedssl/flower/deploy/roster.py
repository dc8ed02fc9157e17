"""Which node serves which client: asked of the nodes, and followed as they come, go and return."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.exchange import exchange, reason
from fedssl.flower.in_process import InProcessGrid

_START_S = 120.0  # how long a run waits for its first nodes
_AGAIN_S = 30.0  # how often a node that has not said who it is is asked again
_ANSWER_S = 120.0  # how long a node may take to say who it is: it starts a process for that


@dataclass(frozen=True)
class InOrder(Mapping[int, int]):
    """Node k serves client k - 1; holds no table."""

    clients: int

    def __getitem__(self, client: int) -> int:
        if not 0 <= client < self.clients:
            raise KeyError(client)
        return client + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.clients))

    def __len__(self) -> int:
        return self.clients


class Roster(Mapping[int, int]):
    """The nodes of a SuperLink by client. Their ids are random, so they are asked who they are.

    Args:
        grid: of all nodes.
        clients: of the run.
        timeout_s: for an answer.

    Attributes:
        forgetful: clients whose node says that it keeps nothing if its process ends.
    """

    def __init__(self, grid: Grid, clients: int, timeout_s: float) -> None:
        self._grid, self._clients, self._timeout_s = grid, clients, min(timeout_s, _ANSWER_S)
        self._client_of: dict[int, int] = {}  # by node, those that have said who they are
        self._node_of: dict[int, int] = {}
        self._refused: dict[int, str] = {}  # by node, why one has not
        self._asked: dict[int, float] = {}  # by node, when
        self.forgetful: set[int] = set()

    def __getitem__(self, client: int) -> int:
        return self._node_of[client]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._node_of))

    def __len__(self) -> int:
        return len(self._node_of)

    def wait(self, wanted: Collection[int], enough: int, timeout_s: float, patience_s: float = 0.0) -> set[int]:
        """Wait until the nodes of so many clients are online; returns which clients' are.

        Args:
            wanted: the clients whose nodes are looked for.
            enough: how many of them are waited for.
            timeout_s: how long.
            patience_s: how long the others are waited for, too.

        Raises:
            ProtocolError: two nodes say that they are the same client.
        """
        began, pause = time.monotonic(), 0.05
        while True:
            there = self._there(wanted)
            waited = time.monotonic() - began
            if len(there) == len(wanted) or waited >= timeout_s or (len(there) >= enough and waited >= patience_s):
                return there
            time.sleep(min(pause, timeout_s - waited))
            pause = min(2.0, pause * 1.5)

    def why(self, client: int) -> str:
        """Why a client is not there, as far as anybody has said."""
        said = next(iter(self._refused.values()), "")
        return f"client {client} has no node" + (f" (one that is there says: {said})" if said else "")

    def _there(self, wanted: Collection[int]) -> set[int]:
        online = set(self._grid.get_node_ids())
        if any(self._node_of.get(client) not in online for client in wanted):
            self._ask(sorted(online - self._client_of.keys()))
            self._settle(online)
        return {client for client in wanted if self._node_of.get(client) in online}

    def _ask(self, nodes: list[int]) -> None:
        now = time.monotonic()
        nodes = [node for node in nodes if now - self._asked.get(node, -_AGAIN_S) >= _AGAIN_S]
        self._asked.update(dict.fromkeys(nodes, now))
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        for reply in exchange(self._grid, questions, self._timeout_s):
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._refused[node] = reason(reply.error.reason)
                continue
            self._refused.pop(node, None)
            said = codec.metrics_of(reply.content)
            client = int(cast(int, said["partition-id"]))
            self._client_of[node] = client
            if said.get(codec.KEEPS):
                self.forgetful.discard(client)
            else:
                self.forgetful.add(client)

    def _settle(self, online: set[int]) -> None:
        """Give each client the node that is online; one that has a living node keeps it."""
        serving: dict[int, list[int]] = {}
        for node, client in sorted(self._client_of.items()):
            if node in online:
                serving.setdefault(client, []).append(node)
        for client, nodes in serving.items():
            if self._node_of.get(client) in nodes:
                continue  # another one may have come for it, and waits until this one has gone
            if len(nodes) > 1:
                raise ProtocolError(
                    f"{len(nodes)} nodes say that they are client {client}: give each a partition-id of its own"
                )
            self._node_of[client] = nodes[0]


def roster(grid: Grid, clients: int, timeout_s: float, needed: int) -> Mapping[int, int]:
    """The nodes of a run's clients as it begins.

    Args:
        grid: of all nodes.
        clients: of the run.
        timeout_s: for a round; the first nodes are waited for no longer than two minutes.
        needed: without so many clients the run does not begin.

    Raises:
        ProtocolError: too few clients have a node in time, or two have the same.
    """
    if isinstance(grid, InProcessGrid):
        return InOrder(clients)
    limit = min(timeout_s, _START_S)
    found = Roster(grid, clients, timeout_s)
    there = found.wait(range(clients), clients, limit)
    if len(there) < needed:
        missing = [client for client in range(clients) if client not in there]
        raise ProtocolError(
            f"{len(missing)} of {clients} clients have no node (the first is partition {missing[0]}): {_told(found)}"
            "start more nodes (--federation-config 'num-supernodes=...') or lower federation.clients"
        )
    return found


def _told(found: Roster) -> str:
    said = found.why(0).partition("(")[2]
    return f"{said.rstrip(')')}; " if said else ""


def present(nodes: Mapping[int, int], wanted: Collection[int], enough: int, timeout_s: float) -> set[int]:
    """The clients whose node is there to be asked; see `Roster.wait`."""
    return nodes.wait(wanted, enough, timeout_s) if isinstance(nodes, Roster) else set(wanted)
