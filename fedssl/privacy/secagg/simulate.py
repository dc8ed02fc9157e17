"""Both sides of secure aggregation in one function: the protocol at a glance, and its clients' drop-outs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedssl.privacy.secagg import collector, participant
from fedssl.privacy.secagg.participant import Session

STAGES = ("advertise", "share", "mask", "reveal")


@dataclass(frozen=True)
class Outcome:
    """What the server has at the end."""

    total: np.ndarray  # (d,) the sum over the survivors, modulo 2**32 or 2**64
    survivors: tuple[int, ...]
    seen: Mapping[int, np.ndarray]  # by survivor: the masked vector, all that the server sees of its own


def aggregate(
    vectors: Mapping[int, np.ndarray],
    threshold: int,
    gone: Mapping[int, str] | None = None,
    session: bytes = b"one",
    colluders: int = 0,
) -> Outcome:
    """One secure aggregation.

    Args:
        vectors: by client, (d,) uint32 or uint64 each.
        threshold: see `Session`.
        gone: the step at which a client falls silent, one of `STAGES`; the others do all.
        session: its name.
        colluders: see `Session`.

    Raises:
        TooFewError: fewer clients than the threshold are left.
    """
    agreed, gone = Session(session, threshold, colluders), gone or {}

    def there(step: str) -> list[int]:
        return [c for c in sorted(vectors) if c not in gone or STAGES.index(gone[c]) > STAGES.index(step)]

    announced = {client: participant.advertise(client) for client in there("advertise")}
    roster = {client: one.advert for client, one in announced.items()}
    collector.enough(roster, agreed, "sent their keys")
    graph = participant.graph_of(agreed, roster)

    shared = {client: participant.share(announced[client], agreed, roster) for client in there("share")}
    collector.enough(shared, agreed, "shared their secrets")
    letters = collector.deliver(graph, {client: sent for client, (_, sent) in shared.items()})

    holding = {client: participant.receive(shared[client][0], letters[client]) for client in there("mask")}
    masked = {c: participant.mask(shared[c][0], holding[c], vectors[c]) for c in there("mask")}
    collector.enough(masked, agreed, "sent their masked vectors")
    collector.tied(graph, masked)
    total = np.zeros_like(next(iter(vectors.values())))
    for vector in masked.values():
        total += vector

    reveals = {client: participant.reveal(holding[client], masked.keys()) for client in there("reveal")}
    plain = collector.unmask(agreed, roster, graph, shared.keys(), total, masked.keys(), reveals)
    return Outcome(plain, tuple(sorted(masked)), masked)
