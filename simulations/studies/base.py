"""What a study is, and the bench it works at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedssl import config
from fedssl.errors import ConfigError
from fedssl.progress import Reporter
from fedssl.report.charts import Panel
from fedssl.rundir import RunDirectory
from fedssl.tracking import followed

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A claim of the theory, and what was found."""

    claim: str  # such as "T4: the bias of the bound falls like 1 / N"
    holds: bool | None  # None where the measurement does not decide
    found: str  # one sentence with the numbers


@dataclass(frozen=True)
class Outcome:
    """What a study leaves behind."""

    table: Sequence[Row]  # one row a setting, all with the same keys
    charts: Mapping[str, Sequence[Panel | Sequence[Panel]]]  # file name -> panels, or rows of them, below each other
    findings: Sequence[Finding]


class Study(Protocol):
    """A frozen dataclass; its fields are the study's options, `tiny` among them: the whole in under a minute."""

    @property
    def tiny(self) -> bool:
        """Whether everything is smaller than the study's size."""
        ...

    def run(self, bench: Bench) -> Outcome:
        """Measure everything; runs that have finished before are read, not repeated."""
        ...


@dataclass(frozen=True)
class Bench:
    """Where a study works: its folder, and the options of the runs that the user has set."""

    folder: Path
    overrides: Sequence[str] = ()
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))
    said: list[tuple[str, ...]] = field(default_factory=list)  # the options of the runs so far

    def pretrain(self, *options: str) -> RunDirectory:
        """The finished run with these options of `fedssl pretrain`; those of the user come last and win."""
        plan = config.compose([*options, *self.overrides, f"out={self.folder / 'runs'}", "name=null"])
        rundir = plan.open()
        if not rundir.done:
            before = self.said[-1] if self.said else ()
            new = [option for option in options if option not in before]
            self.said.append(options)
            self.reporter.say(f"run {len(self.said)}: {' '.join(new) or 'the options of the one before'}")
            with followed(plan.build_track(), rundir):
                plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
        return rundir


def check(study: Study, *, zero: Sequence[str] = ()) -> None:
    """Refuses empty lists, and numbers of 0 or less; those options that `zero` names may be 0.

    Raises:
        ConfigError: an option that leaves nothing to measure.
    """
    for name, value in vars(study).items():
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            raise ConfigError(f"study.{name} is empty, but it says what is compared: give one value or more")
        if odd := [v for v in values if not (math.isfinite(v) and v >= 0 and (v > 0 or name in zero or v is False))]:
            least = "0 or more" if name in zero else "more than 0"
            raise ConfigError(f"study.{name} holds {odd[0]:g}, which leaves nothing to measure: give {least}")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (N - 1; 0 for one value) over seeds."""
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
