"""Who shares masks and secrets with whom: everybody, or of many those who are close on a ring that nobody chose."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import comb

SECURITY = 40  # bits: the chance that colluding clients learn more than the sum is below 2**-40 a round
COMPLETE = 32  # up to so many clients are all neighbours: little is to be saved
CORRECTNESS = 20  # bits: the chance that enough clients are left and a sum stays hidden all the same


@dataclass(frozen=True)
class Graph:
    """Clients on a ring; each has the nearest `reach` on either side as neighbours.

    Attributes:
        ring: clients, in the order of the ring.
        reach: at least 1; half of the clients make everybody a neighbour of everybody.
        shares: so many of a client and its neighbours recover a secret of that client; more than half of them, so that
            two halves that are told different survivors do not reveal both secrets.
    """

    ring: tuple[int, ...]
    reach: int
    shares: int

    @cached_property
    def _places(self) -> dict[int, int]:
        return {client: place for place, client in enumerate(self.ring)}

    def holders(self, client: int) -> list[int]:
        """A client and its neighbours, sorted: they hold shares of its secrets, in this order."""
        count, place = len(self.ring), self._places[client]
        if 2 * self.reach + 1 >= count:
            return sorted(self.ring)
        return sorted(self.ring[(place + away) % count] for away in range(-self.reach, self.reach + 1))

    def connected(self, among: Collection[int]) -> bool:
        """Whether masks tie all of these clients together; else the server would learn the sum of a part of them.

        The ring falls apart where it is cut twice: two gaps, each too wide for any pair of neighbours to span.
        """
        places = sorted(self._places[client] for client in set(among))
        wide = sum(later - place > self.reach for place, later in pairwise(places))
        around = bool(places) and places[0] + len(self.ring) - places[-1] > self.reach
        return wide + around <= 1


def arrange(adverts: Mapping[int, bytes], fewest: int, colluders: int) -> Graph:
    """The graph of a session: the same for the server and every client, from what all of them have seen.

    The order on the ring follows from a hash of all public keys, which are fresh in every round. So no client chooses
    its neighbours, and neither does a server, if they follow the protocol; who does not could try keys until the order
    suits it, or leave out other clients.

    Args:
        adverts: by client: what it has advertised, all of one length.
        fewest: clients whose sum is ever opened.
        colluders: clients that may collude with the server.
    """
    whole = hashlib.sha256()
    for client in sorted(adverts):
        whole.update(client.to_bytes(8) + adverts[client])
    ring = sorted(adverts, key=lambda client: hashlib.sha256(whole.digest() + client.to_bytes(8)).digest())
    return Graph(tuple(ring), *sizes(len(ring), fewest, colluders))


@lru_cache(maxsize=256)
def sizes(clients: int, fewest: int, colluders: int) -> tuple[int, int]:
    """How far neighbours reach, and how many shares recover a secret: the least that is enough, both as in `Graph`.

    With k = 2 * reach neighbours and t shares, a ring in random order of which the colluders and those who drop out do
    not depend has, except with a probability below 2**-SECURITY in all,

    - no client of whose k neighbours t collude (hypergeometric, times the number of clients), and
    - the honest survivors connected. Else there are two separate runs of `reach` clients of whom each colludes or is
      gone; two given runs are that with probability C(b, k) / C(n, k) if b of n clients are, and there are fewer than
      n**2 / 2 such pairs;

    and, except with a probability below 2**-CORRECTNESS,

    - of every client t shares are with those who answer (hypergeometric, times the number of clients).

    These are the conditions of Bell et al. 2020, computed with whole numbers; asking for two cuts of the ring, where
    they ask for one, saves half of the neighbours in the second. The complete graph needs none of them: there any
    `fewest` clients recover every secret, fewer learn nothing, and all are connected.

    Args:
        clients: that have advertised keys.
        fewest: of them whose sum is ever opened.
        colluders: fewer than `fewest`.

    References:
        Bell, Bonawitz, Gascon, Lepoint & Raykova 2020, https://eprint.iacr.org/2020/704, section 3
    """
    complete = max(1, clients // 2), fewest
    if clients <= COMPLETE:
        return complete
    low, high = 0, 1
    while high < clients // 2 and not _shares(clients, fewest, colluders, high):
        low, high = high, 2 * high
    if high >= clients // 2:
        high = clients // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _shares(clients, fewest, colluders, middle) else (middle, high)
    shares = _shares(clients, fewest, colluders, high)
    return (high, shares) if shares else complete


def _shares(clients: int, fewest: int, colluders: int, reach: int) -> int:
    """The fewest shares with which this reach is enough; 0 if there are none."""
    count, away = 2 * reach, clients - fewest
    apart = clients**2 // 2 * comb(colluders + away, count) << (SECURITY + 1)
    if count + 1 >= clients or apart > comb(clients, count):
        return 0
    safe = _least(clients - 1, colluders, count, clients << (SECURITY + 1))
    shares = max(safe, reach + 1)
    # Of a client that is gone, and of one that is there and holds a share itself.
    for there, needed in ((fewest, shares), (fewest - 1, shares - 1)):
        others = clients - 1 - there
        missing = _least(clients - 1, others, count, clients << CORRECTNESS)
        if count - needed + 1 < missing:
            return 0
    return shares


def _least(total: int, marked: int, drawn: int, times: int) -> int:
    """The least m so that m or more marked ones are among the drawn with a probability below 1 / times."""
    all_ways, ways, m = comb(total, drawn), 0, min(drawn, marked)
    while (ways := ways + comb(marked, m) * comb(total - marked, drawn - m)) * times < all_ways:
        m -= 1  # ends at 0 at the latest, where all ways are counted
    return m + 1
