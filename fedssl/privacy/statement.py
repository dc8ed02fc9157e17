"""What a run says of its privacy, in `privacy.json`: the whole claim, what it has cost, and what it does not cover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedssl.privacy.accountant import FAST, Accountant, Release, compose, curve, worst

DELTAS = tuple(10.0**-k for k in range(3, 11))
NOT_COVERED = (
    "what is measured on the server of the clients' examples or their labels: kNN, probes, the collapse monitor",
    "choosing hyper-parameters, rounds or seeds by looking at results",
    "copies of a record, on one client or on two: each copy is a record of its own",
    "which clients take part, when, and how long they take",
)
PUBLIC_START = "what the encoder that the run began with was trained on, which is taken as public: see start"
SEEDED = (
    "whoever knows the seed of the run, from which noise and samples follow: privacy.secure=true, or "
    "aggregation.secure=true for the unit client, for real use"
)


@dataclass(frozen=True)
class Declared:
    """What a mechanism claims, in words.

    Attributes:
        unit: record or client.
        relation: which data sets are neighbours.
        adversary: who sees what.
        sampler: which units a release sees.
        released: what is noised, and what follows from it.
        delta: of every epsilon of the run.
        budget: the largest epsilon, or None.
        seeded: whether whoever knows the run's seed can take the noise off.
        public: what is taken as public although it is said of the examples.
    """

    unit: str
    relation: str
    adversary: str
    sampler: str
    released: str
    delta: float
    budget: float | None
    seeded: bool
    public: tuple[str, ...] = ()


def nothing() -> dict[str, Any]:
    """The statement of a run that claims nothing."""
    return {"unit": None, "epsilon": None, "says": "no differential privacy is claimed"}


def spent(rows: Iterable[Mapping[str, Any]]) -> dict[int, Release]:
    """By client, its releases so far, from the rows of clients.jsonl; only what it says last counts."""
    last: dict[int, Release] = {}
    for row in rows:
        if "spent" in row:
            last[int(row["client"])] = Release(row["noise_multiplier"], row["sample_rate"], int(row["spent"]))
    return last


@dataclass
class Heard:
    """What has been heard of the spending of clients, round by round; a round costs time of its own rows only.

    Attributes:
        releases: by client, as its last reply says.
        turn: releases of the costliest turn of any client.
        lost: by client, its turns since that reply, of which nothing was heard.
    """

    releases: dict[int, Release] = field(default_factory=dict)
    turn: int = 0
    lost: dict[int, int] = field(default_factory=dict)
    _rounds: dict[int, int] = field(default_factory=dict)  # by client, that of its last reply

    def add(self, rows: Iterable[Mapping[str, Any]], failures: Iterable[Mapping[str, Any]]) -> None:
        """Take note of later rounds than before: rows of clients.jsonl, and of failures.jsonl."""
        for row in rows:
            if "spent" in row:
                client, total = int(row["client"]), int(row["spent"])
                before = self.releases[client].count if client in self.releases else 0
                self.turn = max(self.turn, total - before)
                self.releases |= spent([row])
                self._rounds[client] = int(row["round"])
                self.lost.pop(client, None)
        for row in failures:
            client = int(row["client"])
            if row.get("asked", True) and int(row["round"]) > self._rounds.get(client, 0):
                self.lost[client] = self.lost.get(client, 0) + 1

    def with_lost(self) -> dict[int, Release]:
        """By client, its releases, those of turns included whose replies were lost; see `with_lost` of this module."""
        found = dict(self.releases)
        costliest = worst(list(found.values()), DELTAS[2])
        if costliest is None:  # nobody has ever been heard
            return found
        for client, count in self.lost.items():
            known = found.get(client, replace(costliest, count=0))
            found[client] = replace(known, count=known.count + count * self.turn)
        return found


def with_lost(rows: Iterable[Mapping[str, Any]], failures: Iterable[Mapping[str, Any]]) -> dict[int, Release]:
    """`spent`, and the turns whose replies were lost or refused, which somebody may have seen all the same.

    Until a client's next reply says what it has spent in all, each of them counts as much as the costliest turn of any
    client.

    Args:
        rows: of clients.jsonl.
        failures: of failures.jsonl; those of clients that were never asked cost nothing.
    """
    heard = Heard()
    heard.add(rows, failures)
    return heard.with_lost()


def running(releases: Sequence[Release], delta: float) -> float | None:
    """The largest epsilon so far, quickly and a little too large; None before the first release."""
    found = worst(releases, delta)
    return None if found is None else compose([found], delta, grid=FAST)


def statement(declared: Declared, releases: Sequence[Release]) -> dict[str, Any]:
    """The whole statement, for the client or federation that has spent most.

    Args:
        declared: the claim.
        releases: one for each data set, which share no unit, so the largest epsilon is that of the run.
    """
    found = worst(releases, declared.delta)
    content: dict[str, Any] = asdict(declared)
    if found is None:
        return {**content, "epsilon": 0.0, "not_covered": _holes(declared), "says": sentence(declared, 0.0)}
    costs = {name: _number(compose([found], declared.delta, name)) for name in Accountant}
    points = zip(DELTAS, curve(found, DELTAS), strict=True)
    return {
        **content,
        "epsilon": costs[Accountant.pld],
        "accountants": costs,
        "curve": [{"delta": delta, "epsilon": _number(value)} for delta, value in points],
        "worst": asdict(found),
        "data_sets": len(releases),
        "not_covered": _holes(declared),
        "says": sentence(declared, costs[Accountant.pld]),
    }


def with_public_start(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `privacy.json` of a run that began with an encoder of another run; every claim in it says so."""
    found = {key: with_public_start(value) if key == "record" else value for key, value in content.items()}
    return found | ({"not_covered": [*content["not_covered"], PUBLIC_START]} if "not_covered" in content else {})


def sentence(declared: Declared, epsilon: float | None) -> str:
    """The claim in one sentence."""
    cost = "no epsilon" if epsilon is None else f"ε = {epsilon:.2f}"
    return (
        f"{cost} at δ = {declared.delta:g} for one {declared.unit} ({declared.relation}), against {declared.adversary}"
    )


def _holes(declared: Declared) -> list[str]:
    return [*NOT_COVERED, *declared.public, *((SEEDED,) if declared.seeded else ())]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
