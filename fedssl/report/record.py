"""What a run directory holds, read for people: its numbers so far, and what they say about collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedssl.errors import ResumeError
from fedssl.export import PretrainedEncoder, load_encoder
from fedssl.files import number
from fedssl.measures.alarms import GAUGE, SPREAD, USED, Alarm, at_end, judge
from fedssl.report.page import MINUS, NOTHING, decimal
from fedssl.rundir import RunDirectory

_TOLD = (
    ("linear", "linear_accuracy", 3),
    ("kNN", "knn_accuracy", 3),
    ("effective rank", "effective_rank", 1),
    ("ε", "epsilon", 2),
)


@dataclass(frozen=True)
class Check:
    """A diagnostic in words."""

    name: str
    sentence: str
    alarm: str = ""  # its name, or nothing


@dataclass(frozen=True, repr=False)
class Record:
    """What a run directory holds, read once; what the run has not come to is empty."""

    path: Path
    done: bool
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # one a round
    summary: Mapping[str, Any]  # of an unfinished run, what its rows tell of it
    manifest: Mapping[str, Any]
    split: Mapping[str, Any]
    probes: Mapping[str, Mapping[str, float]]  # of the encoders that were probed
    spectra: Mapping[str, Sequence[float | None]]
    dim: int | None  # features of the encoder
    parts: Sequence[Mapping[str, Any]]  # of `collapse.jsonl`: one a round, model and part
    alarms: Sequence[Alarm]
    payload: Mapping[str, Any]  # what leaves a client
    claim: Mapping[str, Any]  # of privacy

    @classmethod
    def read(cls, run: RunDirectory) -> Record:
        """Read a run.

        Raises:
            ResumeError: a file of it is damaged, or it is no run.
        """
        config, rows = run.config(), run.rows()
        names = ("probes", "split", "manifest", "payload", "privacy")
        final, split, manifest, payload, claim = (_read(run, f"{name}.json") for name in names)
        numbers = run.read("summary.json") if run.done else so_far(rows)
        probes = {name: values for name, values in final.get("probes", {}).items() if values}
        spectra, parts, method = final.get("spectra", {}), run.rows("collapse.jsonl"), config.get("method", {})
        dim, path = _dim(config, spectra), run.path.resolve()
        finished = run.done or not parts
        alarms = at_end(parts, method, numbers, numbers["rounds"], dim) if finished else judge(parts, method)
        about = (path, run.done, config, rows, numbers, manifest, split, probes, spectra, dim)
        return cls(*about, parts, alarms, payload, claim)

    def encoder(self) -> PretrainedEncoder:
        """The pretrained encoder, as `fedssl.load_encoder` rebuilds it.

        Raises:
            ResumeError: the run has not ended.
        """
        return load_encoder(self.path)

    def __repr__(self) -> str:
        shown = [
            f"{name} {value:.{digits}f}"
            for name, key, digits in _TOLD
            if (value := number(self.summary.get(key))) is not None
        ]
        rounds = f"{self.summary['rounds']} rounds" + ("" if self.done else " so far")
        return f"<run {self.path}: {', '.join([rounds, *shown])}>"

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
        return _call(options) if isinstance(options, Mapping) else f"{NOTHING}()"

    @property
    def lasting(self) -> list[Alarm]:
        """The alarms that were still raised when last measured."""
        measured = max((row["round"] for row in self.parts), default=0)
        return [alarm for alarm in self.alarms if alarm.last >= measured]

    @property
    def rank(self) -> float | None:
        """The effective rank of the merged features."""
        return number(self.summary.get("effective_rank", self.summary.get("rankme")))


def begun(run: RunDirectory) -> Record:
    """Read a run that there is something to tell of.

    Raises:
        ResumeError: it has no finished round, is damaged, or is no run.
    """
    record = Record.read(run)
    if not record.rows:
        raise ResumeError(
            f"{run.path} has no finished round, so there is nothing to report: `fedssl resume {run.path}` first"
        )
    return record


def _call(node: Mapping[str, Any]) -> str:
    """A configuration node as the call that it stands for, such as Dirichlet(alpha=0.3, min_size=2)."""
    own = ((k, _call(v) if isinstance(v, Mapping) else v) for k, v in node.items() if k != "_target_")
    name = str(node.get("_target_") or NOTHING).rpartition(".")[2]
    return f"{name}({', '.join(f'{k}={v}' for k, v in own)})"


def _read(run: RunDirectory, name: str) -> dict[str, Any]:
    """A JSON file of a run, or nothing if the run has not come that far."""
    return run.read(name) if (run.path / name).exists() else {}


def _dim(config: Mapping[str, Any], spectra: Mapping[str, Sequence[Any]]) -> int | None:
    """The number of features, from a spectrum or from the configuration; None if neither tells."""
    if spectra:
        return len(next(iter(spectra.values())))
    encoder = config.get("encoder")
    dim = encoder.get("dim") if isinstance(encoder, Mapping) else None
    return dim if isinstance(dim, int) else None


def so_far(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of the rounds so far: the latest of each, and the sums of time and bytes."""
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    sums = {key: sum(row.get(key) or 0 for row in rows) for key in ("seconds", "bytes_up", "bytes_down")}
    return latest | sums | {"rounds": latest.get("round", 0)}


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
