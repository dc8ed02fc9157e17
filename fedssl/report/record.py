"""What a run directory holds, read for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedssl.errors import ResumeError
from fedssl.export import PretrainedEncoder, load_encoder
from fedssl.files import number
from fedssl.measures.alarms import Alarm, at_end, judge
from fedssl.report.page import NOTHING
from fedssl.rundir import RunDirectory

_TOLD = (
    ("linear", "linear_accuracy", 3),
    ("kNN", "knn_accuracy", 3),
    ("effective rank", "effective_rank", 1),
    ("ε", "epsilon", 2),
)


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
