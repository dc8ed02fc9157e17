"""The server's account for the unit `client`: what the attempts of rounds have released, and what planned ones will."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedssl.aggregation.base import Planned, Private
from fedssl.privacy import statement
from fedssl.privacy.accountant import Release, joint
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.record_dp import RecordDP


def spend(private: Private, plan: Planned, ledger: Ledger, at: int, attempt: int) -> Ledger:
    """The ledger with an attempt of a round."""
    entry = private.entry(plan, at, attempt)
    return ledger.spend(entry) if entry.count else ledger


def planned(private: Private, plan: Planned) -> Ledger:
    """The ledger of a run whose rounds all succeed at once."""
    ledger = Ledger()
    for at in range(1, plan.rounds + 1):
        ledger = spend(private, plan, ledger, at, 1)
    return ledger


def replayed(private: Private, plan: Planned, attempts: Iterable[int], done: int) -> Ledger:
    """The ledger of a run that is resumed.

    Args:
        private: the aggregation.
        plan: of the run.
        attempts: the rounds that have begun, in order; each was noted before anybody was asked and is never taken
            back, so that what was released in a round that is lost is counted, too.
        done: the last round of the checkpoint; all up to it have begun at least once.
    """
    ledger, counts = Ledger(), dict.fromkeys(range(1, done + 1), 0)
    for at in attempts:
        counts[at] = counts.get(at, 0) + 1
    for at, count in sorted(counts.items()):
        for attempt in range(1, max(count, 1) + 1):
            ledger = spend(private, plan, ledger, at, attempt)
    return ledger


def fits(private: Private, plan: Planned, ledger: Ledger, at: int, attempt: int) -> bool:
    """Whether an attempt of a round stays within the budget.

    The noise was solved for every planned round once, so only repeated rounds can be too many.
    """
    entry, (budget, delta) = private.entry(plan, at, attempt), private.budget(plan)
    repeated = any(old.attempt > 1 for old in (*ledger.entries, entry))
    return budget is None or not repeated or ledger.affordable(entry, budget, delta) == entry.count


def total(ledger: Ledger) -> list[Release]:
    """Everything as one release: of equal ones their number, of unsampled ones their joint noise; empty for nothing."""
    found = [entry.release for entry in ledger.entries]
    if not found:
        return []
    if len({replace(r, count=0) for r in found}) == 1:
        return [replace(found[0], count=sum(r.count for r in found))]
    noise = joint(*(r.noise_multiplier for r in found for _ in range(r.count)))
    return [Release(noise, 1.0, concentrated=any(r.concentrated for r in found))]


def claim(private: Private, plan: Planned, ledger: Ledger) -> dict[str, Any]:
    """The statement of `privacy.json`, with what the planned rounds cost and who pays what."""
    declared = private.declaration(plan)
    content: Mapping[str, Any] = statement.statement(declared, total(ledger))
    return {**content, "planned_epsilon": planned(private, plan).epsilon(declared.delta)}


def whole(privacy: object, records: Sequence[Release], clients: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says of its privacy: of clients, of their records, of both, or that it claims nothing.

    The two units are two claims: neither epsilon says anything of the other.

    Args:
        privacy: the example-level one.
        records: what it has released, one for each client.
        clients: see `claim`; empty where nothing is claimed of them.
    """
    if not isinstance(privacy, RecordDP):
        return dict(clients) or statement.nothing()
    record = statement.statement(privacy.declared, records)
    return {**clients, "record": record} if clients else record
