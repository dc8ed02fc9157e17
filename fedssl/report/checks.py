"""What the numbers of a run say about collapse, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedssl.files import number
from fedssl.measures.alarms import GAUGE, SPREAD, USED, Alarm
from fedssl.report.page import MINUS, decimal
from fedssl.report.record import Record, so_far


@dataclass(frozen=True)
class Check:
    """A diagnostic in words."""

    name: str
    sentence: str
    alarm: str = ""  # its name, or nothing


def collapse_checks(record: Record) -> list[Check]:
    """Say of each diagnostic that was measured whether it is healthy, of clients how they differ, and every alarm."""
    features = list(_features(record.summary, record.dim))
    said = {check.alarm for check in features}
    alarms = [a for a in record.alarms if not (a.part == "encoder" and a.name in said and a in record.lasting)]
    return [*features, *_clients(so_far(record.rows)), *_alarms(alarms, record.lasting)]


def _features(numbers: Mapping[str, Any], dim: int | None) -> Iterator[Check]:
    std, spread, rank = (number(numbers.get(key)) for key in ("feature_std", "uniformity", "rankme"))
    for key, name in (("feature_std", "Feature spread"), ("uniformity", "Uniformity"), ("rankme", "Effective rank")):
        if key in numbers and number(numbers[key]) is None:
            yield Check(name, "Alarm, divergence: not a finite number.", "divergence")
    if std is not None and dim:
        gauge = std * math.sqrt(dim)
        said = f"{gauge:.2f}, where 1 is an even spread over all {dim} dimensions (alarm below {GAUGE:g})."
        yield _judged("Feature spread", said, gauge < GAUGE, "complete collapse")
    if spread is not None:
        limit = decimal(SPREAD, 2)
        scale = f"where 0 is a single point and {MINUS}4 an even cover of the sphere (alarm above {limit})"
        yield _judged("Uniformity", f"{decimal(spread, 2)}, {scale}.", spread > SPREAD, "complete collapse")
    if rank is not None and dim:
        share, limit = (f"{100 * part:.0f} %" for part in (rank / dim, USED))
        said = f"about {rank:.1f} of {dim} dimensions in use, {share} (alarm below {limit})."
        yield _judged("Effective rank", said, rank < USED * dim, "dimensional collapse")


def _judged(name: str, said: str, bad: bool, collapse: str) -> Check:
    return Check(name, f"Alarm, {collapse}: {said}", collapse) if bad else Check(name, f"Healthy: {said}")


def _clients(latest: Mapping[str, Any]) -> Iterator[Check]:
    cka, gap = number(latest.get("client_cka")), number(latest.get("merge_gap_knn"))
    if cka is not None:
        yield Check("Client agreement", f"Linear CKA {cka:.2f} between clients before merging: 1 is equal features.")
    if gap is not None:
        points = f"{abs(100 * gap):.1f} points {'above' if gap > 0 else 'below'}"
        level = "level with" if abs(gap) < 0.0005 else points
        yield Check("Merge gap", f"kNN accuracy after merging is {level} the clients' mean before.")


def _alarms(alarms: Sequence[Alarm], lasting: Sequence[Alarm]) -> Iterator[Check]:
    for alarm in alarms:
        when = f"round {alarm.round}" if alarm.round == alarm.last else f"rounds {alarm.round} to {alarm.last}"
        name = f"{alarm.name[0].upper()}{alarm.name[1:]}, {alarm.part}"
        if alarm in lasting:
            yield Check(name, f"Alarm, {when}: {alarm.found}", alarm.name)
        else:
            yield Check(name, f"In {when} and not since: {alarm.found}")
