"""What a run directory holds, read for people: its numbers so far, and what they say about collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedssl.page import MINUS, NOTHING, decimal, number
from fedssl.rundir import RunDirectory

COLLAPSE_REMEDY = (
    "Likely cause: nothing in the loss keeps features apart, or a teacher or predictor that follows too fast. "
    "Use a contrastive or decorrelating method, raise the teacher's decay, or lower local.lr; after a handful of rounds, "
    "train longer first."
)
RANK_REMEDY = (
    "Likely cause: augmentation or a temperature that lets a few directions suffice, or clients that drift apart. "
    "Use larger batches, fewer local epochs, or a method that decorrelates (VICReg, Barlow Twins)."
)


@dataclass(frozen=True)
class Record:
    """What a run directory holds, read once; what the run has not come to is empty."""

    path: Path
    done: bool
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    numbers: Mapping[str, Any]  # the summary; of an unfinished run, what its rows tell of it
    manifest: Mapping[str, Any]
    probes: Mapping[str, Mapping[str, float]]
    dim: int | None

    @classmethod
    def read(cls, run: RunDirectory) -> Record:
        """Read a run.

        Raises:
            ResumeError: it has no finished round, is damaged, or is no run.
        """
        config, rows = run.config(), run.rows()
        if not rows:
            raise ResumeError(
                f"{run.path} has no finished round, so there is nothing to report: `fedssl resume {run.path}` first"
            )
        final = figures.read_if_there(run, "probes.json")
        numbers = run.read("summary.json") if run.done else _so_far(rows)
        probes = {name: values for name, values in final.get("probes", {}).items() if values}
        dim = figures.feature_dim(config, final.get("spectra", {}))
        manifest = figures.read_if_there(run, "manifest.json")
        return cls(run.path.resolve(), run.done, config, rows, numbers, manifest, probes, dim)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def of(self, *keys: str) -> Any:
        """A value of the configuration; None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def kind(self, group: str) -> str:
        """The class of a group of the configuration, such as SimCLR."""
        return str(self.of(group, "_target_") or NOTHING).rpartition(".")[2]

    @property
    def partition(self) -> str:
        """The partition with its options."""
        options = self.of("partition")
        own = options.items() if isinstance(options, Mapping) else ()
        return f"{self.kind('partition')}({', '.join(f'{k}={v}' for k, v in own if k != '_target_')})"

    @property
    def rank(self) -> float | None:
        """The effective rank of the merged features."""
        return number(self.numbers.get("effective_rank", self.numbers.get("rankme")))


def _so_far(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of a run that has not ended: the latest of each, and the sums of time and bytes."""
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= {key: value for key, value in row.items() if value is not None}
    sums = {key: sum(row.get(key) or 0 for row in rows) for key in ("seconds", "bytes_up", "bytes_down")}
    return latest | sums | {"rounds": latest.get("round", len(rows))}


def collapse_checks(record: Record) -> list[tuple[str, bool, str]]:
    """Read the diagnostics: (name, whether it is an alarm, one sentence)."""
    numbers, dim, out = record.numbers, record.dim, []
    std, spread, rank = (number(numbers.get(key)) for key in ("feature_std", "uniformity", "rankme"))
    if std is not None and dim:
        gauge = std * math.sqrt(dim)
        said = f"{gauge:.2f} on a scale where 1 is an even spread in all {dim} dimensions"
        out.append(_check("Feature spread", gauge < 0.1, f"{said} (alarm below 0.1)", "complete", COLLAPSE_REMEDY))
    if spread is not None:
        said = f"{decimal(spread, 2)}, where 0 is a single point and {page.MINUS}4 an even cover of the sphere"
        limit = f"{said} (alarm above {page.MINUS}0.5)"
        out.append(_check("Uniformity", spread > -0.5, limit, "complete", COLLAPSE_REMEDY))
    if rank is not None and dim:
        said = f"features use about {rank:.1f} of {dim} dimensions, {100 * rank / dim:.0f} % (alarm below 5 %)"
        out.append(_check("Effective rank", rank / dim < 0.05, said, "dimensional", RANK_REMEDY))
    latest = _so_far(record.rows)
    cka, gap = number(latest.get("client_cka")), number(latest.get("merge_gap_knn"))
    if cka is not None:
        out.append(
            ("Client agreement", False, f"Linear CKA {cka:.2f} between client encoders before merging; 1 is equal.")
        )
    if gap is not None:
        better = f"{abs(100 * gap):.1f} points {'above' if gap >= 0 else 'below'}"
        out.append(
            ("Merge gap", False, f"kNN of the merged encoder is {better} the mean of its clients before merging.")
        )
    return out or [
        ("Not measured", False, "No collapse diagnostics yet: evaluate.every sets how often they are taken.")
    ]


def _check(name: str, alarm: bool, said: str, kind: str, remedy: str) -> tuple[str, bool, str]:
    return name, alarm, f"Alarm, {kind} collapse: {said}. {remedy}" if alarm else f"Healthy: {said}."
