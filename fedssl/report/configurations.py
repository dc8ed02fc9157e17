"""Runs by configuration: those that differ in nothing but their seed belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedssl.errors import ConfigError
from fedssl.files import number
from fedssl.intervals import Interval
from fedssl.report.page import NOTHING
from fedssl.report.record import Record, begun
from fedssl.rundir import NOT_THE_JOB, RunDirectory
from fedssl.tree import flatten

_LONGEST = 56  # characters of a name that a legend can hold
_CLASS = "_target_"
_FIRST = ("method.", "strategy.", "partition.")  # of what differs


@dataclass(frozen=True)
class Configuration:
    """A configuration and its runs.

    Attributes:
        name: tells it apart from the others that it is compared with.
        runs: one a seed; at least one.
    """

    name: str
    runs: Sequence[Record]

    @property
    def label(self) -> str:
        """The name, and how many runs a mean is taken over."""
        return f"{self.name} ({len(self.ended)} runs)" if len(self.ended) > 1 else self.name

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
        groups.setdefault(json.dumps(_job(record), sort_keys=True), []).append(record)
    names = _names(list(groups.values()))
    return [Configuration(name, group) for name, group in zip(names, groups.values(), strict=True)]


def _names(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Names that tell the groups apart: what differs between their configurations, or a run's name, or its path."""
    flat = [_job(group[0]) for group in groups]
    named = [" · ".join(_told(mine, flat)) for mine in flat]
    chosen = [str(group[0].path) for group in groups]
    for names in ([group[0].name for group in groups], named):
        if all(0 < len(name) <= _LONGEST for name in names) and len(set(names)) == len(groups):
            chosen = names  # the later, the better
    return chosen


def _job(record: Record) -> dict[str, str]:
    """What a run computes, by dotted key."""
    found = flatten({key: value for key, value in record.config.items() if key not in (*NOT_THE_JOB, "seed")})
    return {key: str(value) for key, value in found}


def _told(mine: Mapping[str, str], all_of_them: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What is special about a configuration: classes that others have not, with options that others of that class have
    not; then other options.
    """
    vary = _varying(all_of_them)
    groups = [key.removesuffix(_CLASS) for key in vary if key.endswith(_CLASS)]
    groups = sorted(groups, key=lambda group: _FIRST.index(group) if group in _FIRST else len(_FIRST))
    for group in groups:
        if (target := mine.get(group + _CLASS)) is not None:
            alike = [other for other in all_of_them if other.get(group + _CLASS) == target]
            own = [_option(key, mine) for key in _varying(alike) if key.startswith(group)]
            yield target.rpartition(".")[2] + (f"({', '.join(own)})" if own else "")
    yield from (_option(key, mine) for key in vary if not key.startswith(tuple(groups)))


def _varying(several: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for one in several for key in one)
    return [key for key in keys if len({one.get(key) for one in several}) > 1]


def _option(key: str, mine: Mapping[str, str]) -> str:
    return f"{key.rpartition('.')[2]}={mine.get(key, NOTHING)}"
