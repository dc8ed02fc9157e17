"""What a round has come to, as numbers for the logs: updates and failures, privacy spent, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedssl.flower.run.cohort import Cohort
from fedssl.flower.run.running import Running
from fedssl.flower.run.tally import Tally
from fedssl.parts import Arrays
from fedssl.privacy import statement


def counted(run: Running, at: int, tally: Tally, skipped: bool) -> dict[str, Any]:
    """The first entries of a round's row; failures and a round that is skipped are said aloud.

    Raises:
        ProtocolError: it is skipped, and such a round ends the run.
    """
    row: dict[str, Any] = {"round": at, "clients": tally.updates, "failures": len(tally.failures)}
    for sentence in tally.failures:
        run.reporter.say(f"round {at}: {sentence}")
    if skipped:
        why = run.aggregation.skipped
        run.job.federation.skip(at, tally.updates, why)
        row["skipped"] = True
        if why:
            row["reason"] = why
            run.reporter.say(f"round {at} is skipped: {why}")
    return row | tally.means(("loss", "drift")) | run.aggregation.row


def replies(run: Running, cohort: Cohort, tally: Tally) -> list[dict[str, Any]]:
    """The rows of `clients.jsonl`."""
    rows: list[dict[str, Any]] = [{"round": cohort.at, **row} for row in tally.rows]
    if run.asynchronous:
        for row in rows:
            row["staleness"] = cohort.turns[int(row["client"])].staleness(cohort.at)
    return rows


def failures(cohort: Cohort, tally: Tally) -> list[dict[str, Any]]:
    """The rows of `failures.jsonl`."""
    return [
        {"round": cohort.at, "client": client, "why": why, "asked": client in cohort.turns}
        for client, why in sorted(tally.failed.items())
    ]


def spend(run: Running, at: int, replies: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]]) -> None:
    """Take note of what the round has cost of the clients' privacy, lost replies included."""
    run.spent.update(statement.spent(replies))
    run.heard.add(({"round": at, **reply} for reply in replies), failures)
    if failures and run.job.privacy.private:
        run.spent.update(run.heard.with_lost())


def traffic(run: Running, cohort: Cohort, tally: Tally, now: Arrays) -> dict[str, float]:
    """Bytes of the arrays that clients sent and got, those included whose turns were lost."""
    asked = tally.bytes_down or not cohort.turns  # else too few were there to begin, and nobody was sent the model
    lost = len(cohort.attendance.turns) - len(cohort.turns) if asked else 0  # they were sent it, too
    down = tally.bytes_down + lost * run.job.compression.down_bytes(now, run.parameters)
    return {"bytes_up": sum(row["bytes_up"] for row in tally.rows), "bytes_down": down}
