"""What a study is, and the bench it works at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedssl import config
from fedssl.charts import Panel
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

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
    def tiny(self) -> bool: ...

    def run(self, bench: Bench) -> Outcome:
        """Measure everything; runs that have finished before are read, not repeated."""
        ...


@dataclass(frozen=True)
class Bench:
    """Where a study works: its folder, and the options of the runs that the user has set."""

    folder: Path
    overrides: Sequence[str] = ()
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))

    def pretrain(self, *options: str) -> RunDirectory:
        """The finished run with these options of `fedssl pretrain`; those of the user come last and win."""
        plan = config.compose([*options, *self.overrides, f"out={self.folder / 'runs'}", "name=null"])
        rundir = plan.open()
        if not rundir.done:
            self.reporter.say(f"pretrain {' '.join(options)}")
            plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
        return rundir


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (N - 1; 0 for one value) over seeds."""
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
