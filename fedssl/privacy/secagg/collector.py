"""The server's side of secure aggregation: it passes letters on, adds up, and takes the masks off the sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fedssl.errors import ProtocolError
from fedssl.privacy.secagg import keys, shamir
from fedssl.privacy.secagg.participant import Reveal, Roster, Session, commitment, own_mask, pair_mask


def enough(clients: Collection[int], session: Session, did: str) -> None:
    """Refuse to go on with fewer clients than the threshold.

    Args:
        clients: that are still there.
        session: gives the threshold.
        did: what they did, for the message: "sent their keys".

    Raises:
        ProtocolError: they are too few.
    """
    if len(clients) < session.threshold:
        raise ProtocolError(
            f"{len(clients)} clients {did} and the threshold of secure aggregation is {session.threshold}, so the sum "
            "stays hidden: let more clients take part, or lower aggregation.threshold"
        )


def deliver(sent: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
    """The letters for each client that has sent its own, by recipient and sender.

    Raises:
        ProtocolError: a client left another out.
    """
    for sender, letters in sent.items():
        left_out = sorted(sent.keys() - letters.keys() - {sender})
        if left_out:
            raise ProtocolError(
                f"client {sender} sent no shares for client {left_out[0]}: it runs another protocol, leave it out"
            )
    return {to: {sender: letters[to] for sender, letters in sent.items() if sender != to} for to in sent}


def unmask(
    session: Session,
    roster: Roster,
    members: Collection[int],
    total: np.ndarray,
    survivors: Collection[int],
    reveals: Mapping[int, Reveal],
) -> np.ndarray:
    """The sum of the survivors' vectors.

    Args:
        session: of this aggregation.
        roster: of all who advertised keys.
        members: those of them whose letters were delivered, so that the others masked their vectors with them.
        total: (d,) uint32 or uint64, the sum of the survivors' masked vectors.
        survivors: those whose masked vectors are in it.
        reveals: by client, at least as many as the threshold.

    Raises:
        ProtocolError: too few clients, or a share that was changed: what is recovered is not what was advertised.
    """
    enough(survivors, session, "sent their masked vectors")
    enough(reveals, session, "answered with their shares")
    places = {client: i for i, client in enumerate(sorted(roster))}
    size, bits = total.size, total.dtype.itemsize * 8
    plain = total.copy()
    for client in sorted(survivors):
        seed = _recover(client, {places[who]: r.own.get(client, b"") for who, r in reveals.items()}, session)
        if commitment(seed) != roster[client].commitment:
            raise _changed(client)
        plain -= own_mask(seed, session, size, bits)
    for gone in sorted(set(members) - set(survivors)):
        seed = _recover(gone, {places[who]: r.masking.get(gone, b"") for who, r in reveals.items()}, session)
        key = keys.private_key(seed)
        if keys.public_bytes(key) != roster[gone].masking:
            raise _changed(gone)
        for client in sorted(survivors):
            between = pair_mask(key, roster[client].masking, session, size, bits)
            if client < gone:
                plain -= between
            else:
                plain += between
    return plain


def _recover(client: int, shares: Mapping[int, bytes], session: Session) -> bytes:
    try:
        return shamir.combine(shares, session.threshold)
    except (ProtocolError, ValueError) as error:
        raise _changed(client) from error


def _changed(client: int) -> ProtocolError:
    return ProtocolError(
        f"the shares of client {client}'s secret do not give it back, so one was changed or is missing: the round is "
        "lost; repeat it, and leave out the client that answers wrongly"
    )
