"""A client's side of secure aggregation: four steps, each a function from what it remembers to what it sends."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedssl.errors import ProtocolError
from fedssl.privacy.secagg import graph, keys, shamir
from fedssl.privacy.secagg.chacha import words
from fedssl.privacy.secagg.graph import Graph


@dataclass(frozen=True)
class Session:
    """What all clients of one aggregation agree on."""

    name: bytes  # of the run and the round: nothing of another session is accepted
    threshold: int  # so many clients must survive; more than half of those asked
    colluders: int  # so many clients may collude with the server; fewer than the threshold


@dataclass(frozen=True)
class Advert:
    """What a client tells all others, by way of the server."""

    sealing: bytes  # public key for letters between clients
    masking: bytes  # public key for masks between clients
    commitment: bytes  # to the seed of its own mask: a wrong share of it is noticed


Roster = Mapping[int, Advert]  # by client


def graph_of(session: Session, roster: Roster) -> Graph:
    """Who shares masks and secrets with whom."""
    adverts = {client: advert.sealing + advert.masking + advert.commitment for client, advert in roster.items()}
    return graph.arrange(adverts, session.threshold, session.colluders)


@dataclass(frozen=True)
class Announced:
    """A client after its first step."""

    client: int
    sealing_seed: bytes = field(repr=False)
    masking_seed: bytes = field(repr=False)
    own_seed: bytes = field(repr=False)

    @property
    def advert(self) -> Advert:
        """What it sends."""
        return Advert(
            keys.public_bytes(keys.private_key(self.sealing_seed)),
            keys.public_bytes(keys.private_key(self.masking_seed)),
            commitment(self.own_seed),
        )


@dataclass(frozen=True)
class Shared:
    """A client after its second step; `kept` are its shares of its own two secrets, as `Holding.shares`."""

    me: Announced
    session: Session
    roster: Roster
    kept: bytes = field(repr=False)


@dataclass(frozen=True)
class Holding:
    """A client after its third step: its own secrets are gone, the shares of all remain for one answer."""

    client: int
    session: Session
    graph: Graph
    shares: Mapping[int, bytes] = field(repr=False)  # by owner: a share of its masking seed, then one of its own seed


@dataclass(frozen=True)
class Reveal:
    """A client's answer to who survived: of each other client one share, never both."""

    own: Mapping[int, bytes]  # by survivor: of the seed of its own mask
    masking: Mapping[int, bytes]  # by client that dropped out: of the seed of its masking key


def commitment(own_seed: bytes) -> bytes:
    """What a client says of the seed of its own mask before it is revealed."""
    return keys.derive(own_seed, "commitment")


def own_mask(own_seed: bytes, session: Session, size: int, bits: int) -> np.ndarray:
    """(size,) the mask that a client adds on its own."""
    return words(keys.derive(own_seed, "own mask", session.name), size, bits)


def pair_mask(mine: X25519PrivateKey, theirs: bytes, session: Session, size: int, bits: int) -> np.ndarray:
    """(size,) the mask between two clients: the one of the lower number adds it, the other subtracts it."""
    return words(keys.derive(keys.agree(mine, theirs), "pair mask", session.name), size, bits)


def advertise(client: int) -> Announced:
    """Step 1: fresh seeds from the operating system; send `.advert`."""
    return Announced(client, *(os.urandom(shamir.SECRET_BYTES) for _ in range(3)))


def share(me: Announced, session: Session, roster: Roster) -> tuple[Shared, dict[int, bytes]]:
    """Step 2: split both secrets among this client and its neighbours; send a letter to each of those.

    Raises:
        ProtocolError: the roster is too small, lacks this client or gives it other keys, gives two clients the same
            key, or is so large that two groups of clients could each recover a secret.
    """
    if roster.get(me.client) != me.advert:
        raise ProtocolError(
            f"the roster that client {me.client} got has other keys for it than it sent, so it shares nothing: "
            "repeat the round"
        )
    if len({advert.masking for advert in roster.values()} | {a.sealing for a in roster.values()}) < 2 * len(roster):
        raise ProtocolError("the roster has one key twice, so nothing is shared: every client must draw its own keys")
    if not len(roster) / 2 < session.threshold <= len(roster):
        raise ProtocolError(
            f"a threshold of {session.threshold} for {len(roster)} clients is refused, since it must be more than half "
            "of them, or two halves could be told different survivors, and no more than all: change the threshold"
        )
    arranged = graph_of(session, roster)
    holders = arranged.holders(me.client)
    both = (shamir.split(s, arranged.shares, len(holders)) for s in (me.masking_seed, me.own_seed))
    pieces = {client: masking + own for client, masking, own in zip(holders, *both, strict=True)}
    kept, mine = pieces.pop(me.client), keys.private_key(me.sealing_seed)
    letters = {
        client: keys.seal(keys.agree(mine, roster[client].sealing), session.name, me.client, client, piece)
        for client, piece in pieces.items()
    }
    return Shared(me, session, roster, kept), letters


def receive(me: Shared, letters: Mapping[int, bytes]) -> Holding:
    """Open the letters; what comes out is all that is remembered once the masked vector has been sent.

    Args:
        me: after step 2.
        letters: by sender; only they and this client take part from here on.

    Raises:
        ProtocolError: too few letters, one from a stranger, or one that was changed.
    """
    client, session, arranged = me.me.client, me.session, graph_of(me.session, me.roster)
    if len(letters) + 1 < arranged.shares or not letters.keys() <= {*arranged.holders(client)} - {client}:
        raise ProtocolError(
            f"client {client} got shares of {len(letters)} others and needs {arranged.shares} with itself, all of its "
            "neighbours: it sends nothing; more clients have to take part"
        )
    sealing, shares = keys.private_key(me.me.sealing_seed), {client: me.kept}
    for sender in sorted(letters):
        shared = keys.agree(sealing, me.roster[sender].sealing)
        shares[sender] = keys.unseal(shared, session.name, sender, client, letters[sender])
    return Holding(client, session, arranged, shares)


def mask(me: Shared, holding: Holding, vector: np.ndarray) -> np.ndarray:
    """Step 3: the vector behind its masks; send it, and remember no more than `holding`.

    Args:
        me: after step 2.
        holding: its letters, opened.
        vector: (d,) uint32 or uint64; all arithmetic is modulo 2**32 or 2**64.
    """
    client, masking, bits = me.me.client, keys.private_key(me.me.masking_seed), vector.dtype.itemsize * 8
    masked: np.ndarray = vector + own_mask(me.me.own_seed, me.session, vector.size, bits)
    for other in holding.shares.keys() - {client}:
        between = pair_mask(masking, me.roster[other].masking, me.session, vector.size, bits)
        if client < other:
            masked += between
        else:
            masked -= between
    return masked


def reveal(me: Holding, survivors: Collection[int]) -> Reveal:
    """Step 4: one share of each client's secrets. Forget `me` then: a second answer could betray a vector.

    Args:
        me: after step 3.
        survivors: those whose masked vectors the server has.

    Raises:
        ProtocolError: fewer survivors than the threshold, a stranger among them, or this client is not; or no masks
            tie some of them to the others, so that the server would learn the sum of a part of them.
    """
    if len(set(survivors)) < me.session.threshold:
        raise ProtocolError(
            f"the server has the vectors of {len(set(survivors))} clients and the threshold is "
            f"{me.session.threshold}, so client {me.client} reveals nothing: more clients have to take part"
        )
    silent = {*me.graph.holders(me.client)} - me.shares.keys()
    if me.client not in survivors or not set(survivors) <= {*me.graph.ring} - silent:
        raise ProtocolError(
            f"the survivors that the server names are not those that client {me.client} shared secrets with, so it "
            "reveals nothing: repeat the round"
        )
    if not me.graph.connected(survivors):
        raise ProtocolError(
            f"the survivors fall into parts without a mask between them, so client {me.client} reveals nothing, or the "
            "sums of the parts would be known: repeat the round"
        )
    half = shamir.SHARE_BYTES
    return Reveal(
        {client: both[half:] for client, both in me.shares.items() if client in survivors},
        {client: both[:half] for client, both in me.shares.items() if client not in survivors},
    )
