"""Runs by configuration: those that differ in nothing but their seed belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedssl.errors import ConfigError
from fedssl.files import number
from fedssl.intervals import Interval
from fedssl.record import Record, begun
from fedssl.rundir import NOT_THE_JOB, RunDirectory


@dataclass(frozen=True)
class Configuration:
    """A configuration and its runs.

    Attributes:
        label: tells it apart from the others that it is compared with.
        runs: one a seed; at least one.
    """

    label: str
    runs: Sequence[Record]

    @property
    def ended(self) -> Sequence[Record]:
        """What a mean is taken over: the runs that have ended, or all while none has."""
        return ended(self.runs)

    def interval(self, key: str) -> Interval | None:
        """Of a number of the summary over the runs; None if none has it."""
        found = [value for run in self.ended if (value := number(run.summary.get(key))) is not None]
        return Interval.of(found) if found else None


def ended(runs: Sequence[Record]) -> Sequence[Record]:
    """The runs that have ended, or all while none has."""
    return [run for run in runs if run.done] or runs


def configurations(runs: Sequence[RunDirectory]) -> list[Configuration]:
    """The configurations of these runs, in their order; a run that is named twice counts once.

    Raises:
        ConfigError: there is no run.
        ResumeError: a run has no finished round, is damaged, or is no run.
    """
    if not runs:
        raise ConfigError("there is no run to compare: pass the path of at least one")
    groups: dict[str, list[Record]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        record = begun(run)
        job = {key: value for key, value in record.config.items() if key not in (*NOT_THE_JOB, "seed")}
        groups.setdefault(json.dumps(job, sort_keys=True, default=str), []).append(record)
    labels = _labels(list(groups.values()))
    return [Configuration(label, group) for label, group in zip(labels, groups.values(), strict=True)]


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Names that tell the groups apart: what differs of method, strategy and partition, else a run's name."""
    kinds = [(group[0].kind("method"), group[0].kind("strategy"), group[0].partition) for group in groups]
    vary = [i for i in range(3) if len({kind[i] for kind in kinds}) > 1]
    chosen = [str(group[0].path) for group in groups]
    for labels in ([group[0].name for group in groups], [" · ".join(kind[i] for i in vary) for kind in kinds]):
        if all(labels) and len(set(labels)) == len(groups):
            chosen = labels  # the later, the better
    counts = [len(ended(group)) for group in groups]
    return [f"{label} ({n} runs)" if n > 1 else label for label, n in zip(chosen, counts, strict=True)]
