"""The server's side of secure aggregation: it passes letters on, adds up, and takes the masks off the sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fedssl.errors import ProtocolError, TooFewError
from fedssl.privacy.secagg import keys, shamir
from fedssl.privacy.secagg.graph import Graph
from fedssl.privacy.secagg.participant import Reveal, Roster, Session, commitment, own_mask, pair_mask


def enough(clients: Collection[int], session: Session, did: str) -> None:
    """Refuse to go on with fewer clients than the threshold.

    Args:
        clients: that are still there.
        session: gives the threshold.
        did: what they did, for the message: "sent their keys".

    Raises:
        TooFewError: they are too few.
    """
    if len(clients) < session.threshold:
        raise TooFewError(
            f"{len(clients)} clients {did} and the threshold of secure aggregation is {session.threshold}, so the sum "
            "stays hidden: let more clients take part, or lower aggregation.threshold"
        )


def tied(graph: Graph, survivors: Collection[int]) -> None:
    """Refuse to open a sum that would come in parts.

    Raises:
        TooFewError: there are survivors without a mask between them and the others.
    """
    if not graph.connected(survivors):
        raise TooFewError(
            f"{len(survivors)} clients sent their masked vectors and those between them on the ring did not, so the "
            "sums of two parts would be known, and both stay hidden: let more clients take part"
        )


def deliver(graph: Graph, sent: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
    """The letters for each client that has sent its own, by recipient and sender.

    Raises:
        TooFewError: a client has fewer letters than it takes to recover a secret.
        ProtocolError: a client left a neighbour out.
    """
    out: dict[int, dict[int, bytes]] = {client: {} for client in sent}
    for sender, letters in sent.items():
        neighbours = {*graph.holders(sender)} & sent.keys() - {sender}
        left_out = sorted(neighbours - letters.keys())
        if left_out:
            raise ProtocolError(
                f"client {sender} sent no shares for client {left_out[0]}: it runs another protocol, leave it out"
            )
        for to in neighbours:
            out[to][sender] = letters[to]
    fewest = min((len(letters) + 1 for letters in out.values()), default=0)
    if fewest < graph.shares:
        raise TooFewError(
            f"a client and its neighbours that shared their secrets are {fewest} and {graph.shares} are needed, so "
            "nobody sends a vector: let more clients take part"
        )
    return out


def unmask(
    session: Session,
    roster: Roster,
    graph: Graph,
    members: Collection[int],
    total: np.ndarray,
    survivors: Collection[int],
    reveals: Mapping[int, Reveal],
) -> np.ndarray:
    """The sum of the survivors' vectors.

    Args:
        session: of this aggregation.
        roster: of all who advertised keys.
        graph: of both.
        members: those of them whose letters were delivered, so that the others masked their vectors with them.
        total: (d,) uint32 or uint64, the sum of the survivors' masked vectors.
        survivors: those whose masked vectors are in it.
        reveals: by client, at least as many as the threshold.

    Raises:
        TooFewError: too few clients.
        ProtocolError: a share was changed: what is recovered is not what was advertised.
    """
    enough(survivors, session, "sent their masked vectors")
    enough(reveals, session, "answered with their shares")
    tied(graph, survivors)
    size, bits = total.size, total.dtype.itemsize * 8
    plain = total.copy()
    for client in sorted(survivors):
        seed = _recover(client, {who: r.own.get(client, b"") for who, r in reveals.items()}, graph)
        if commitment(seed) != roster[client].commitment:
            raise _changed(client)
        plain -= own_mask(seed, session, size, bits)
    for gone in sorted(set(members) - set(survivors)):
        masked = [client for client in graph.holders(gone) if client in survivors]
        if not masked:
            continue
        seed = _recover(gone, {who: r.masking.get(gone, b"") for who, r in reveals.items()}, graph)
        key = keys.private_key(seed)
        if keys.public_bytes(key) != roster[gone].masking:
            raise _changed(gone)
        for client in masked:
            between = pair_mask(key, roster[client].masking, session, size, bits)
            if client < gone:
                plain -= between
            else:
                plain += between
    return plain


def _recover(client: int, revealed: Mapping[int, bytes], graph: Graph) -> bytes:
    shares = {place: revealed[who] for place, who in enumerate(graph.holders(client)) if who in revealed}
    if len(shares) < graph.shares:
        raise TooFewError(
            f"{len(shares)} clients answered that hold shares of client {client}'s secret and {graph.shares} are "
            "needed, so the sum stays hidden: let more clients take part"
        )
    try:
        return shamir.combine(shares, graph.shares)
    except (ProtocolError, ValueError) as error:
        raise _changed(client) from error


def _changed(client: int) -> ProtocolError:
    return ProtocolError(
        f"the shares of client {client}'s secret do not give it back, so one was changed or is missing: the round is "
        "lost; repeat it, and leave out the client that answers wrongly"
    )
