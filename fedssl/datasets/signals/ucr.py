"""Data sets of the UEA and UCR archives of time series in their text formats, .ts and .tsv."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.datasets.base import Data
from fedssl.datasets.signals.division import divided
from fedssl.datasets.signals.table import Array, Signals, as_signals, numbered
from fedssl.errors import ConfigError
from fedssl.modalities.timeseries import TimeSeriesViews

VIEWS = TimeSeriesViews()
SUFFIXES = (".ts", ".tsv")

Rows = tuple[list[Array], list[str]]  # series (C, T), and their labels, none where the file has none


@dataclass(frozen=True)
class Ucr:
    """One data set of timeseriesclassification.com: `NAME_TRAIN` and `NAME_TEST`, as .ts (UEA, UCR) or .tsv (UCR 2018).

    All series must have one length and no gaps. There are no groups.

    Args:
        path: the folder that holds both files, or the training file.
        augment: how views are drawn.

    References:
        Bagnall et al. 2018, arXiv:1811.00075 (UEA); Dau et al. 2019, arXiv:1810.07758 (UCR).
    """

    path: str
    augment: TimeSeriesViews = VIEWS

    def load(self) -> Data:
        """Reads both files; the archive's own division.

        Raises:
            ConfigError: no such files, or series that are not numbers of one length.
        """
        train = self._training_file()
        test = train.with_name(train.name.replace("_TRAIN", "_TEST"))
        if not test.is_file():
            raise ConfigError(f"There is no {test} beside {train.name}; unpack the data set again.")
        series: list[Array] = []
        labels: list[str] = []
        held: list[bool] = []
        for file in (train, test):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            found = _ts(lines, file) if file.suffix == ".ts" else _tsv(lines, file)
            series += found[0]
            labels += found[1]
            held += [file is test] * len(found[0])
        if len({one.shape for one in series}) != 1 or len(labels) not in (0, len(series)):
            raise ConfigError(
                f"The {len(series)} series of {train} and {test.name} have {len({one.shape for one in series})} shapes "
                f"and {len(labels)} labels; they must be of one length and number of channels, so choose another data "
                "set, or cut them and store them as .npz."
            )
        targets, classes = numbered(_column(labels), (), str(train))
        whole = Signals(as_signals(np.stack(series), False, f"The series of {train}"), targets)
        return divided(whole, classes, "file", 0.5, np.array(held))

    def _training_file(self) -> Path:
        given = Path(self.path).expanduser()
        if given.is_dir():
            found = [file for suffix in SUFFIXES for file in sorted(given.glob(f"*_TRAIN{suffix}"))]
            if len({file.stem for file in found}) == 1:
                return found[0]
        elif given.is_file() and given.suffix in SUFFIXES and "_TRAIN" in given.name:
            return given
        raise ConfigError(
            f"{self.path} is neither a file NAME_TRAIN.ts or NAME_TRAIN.tsv nor a folder with one; "
            "pass data.path=/path/to/one."
        )


def _ts(lines: list[str], file: Path) -> Rows:
    """A header of `@key value` lines, then one series a line: channels parted by colons, the label last."""
    start = next((i for i, line in enumerate(lines) if line.strip().lower() == "@data"), None)
    if start is None:
        raise ConfigError(f"{file} has no line @data; it is not a .ts file, so download it again.")
    pairs = (line[1:].strip().lower().partition(" ") for line in lines[:start] if line.startswith("@"))
    header = {key: value.strip() for key, _, value in pairs}
    if header.get("timestamps", "false") != "false":
        raise ConfigError(f"{file} has a time stamp at each value, which is not read; choose another data set.")
    labelled = header.get("classlabel", "false").startswith("true")
    series, labels = [], []
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if line.strip() and not line.startswith("#"):
            channels = line.strip().split(":")
            if labelled or "targetlabel" in header:
                labels.append(channels.pop())
            series.append(_numbers([channel.split(",") for channel in channels], file, number))
    return series, labels if labelled else []


def _tsv(lines: list[str], file: Path) -> Rows:
    """One series of one channel a line: the label, then the values, parted by tabs."""
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    return [_numbers([row[1:]], file, number) for number, row in rows], [row[0].strip() for _, row in rows]


def _numbers(rows: list[list[str]], file: Path, line: int) -> Array:
    try:
        return np.array(rows, np.float64)
    except ValueError as error:
        raise ConfigError(
            f"Line {line} of {file} is not channels of one length without gaps ({error}); "
            "choose another data set, or fill the gaps and store it as .npz."
        ) from error


def _column(labels: list[str]) -> Array | None:
    """Labels as numbers where all are, so that 1, 1.0 and 1.000e0 are one class, else as words."""
    try:
        return np.array(labels, np.float64) if labels else None
    except ValueError:
        return np.array(labels)
