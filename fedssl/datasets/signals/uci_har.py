"""The UCI HAR data set (human activity, smartphone) in the folder that its authors publish."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.datasets.base import Data
from fedssl.datasets.signals.division import check_test, divided
from fedssl.datasets.signals.table import Array, Signals, as_signals, numbered
from fedssl.errors import ConfigError
from fedssl.modalities.timeseries import TimeSeriesViews

CHANNELS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
VIEWS = TimeSeriesViews(
    rotation=30.0,
    normalise="constants",
    mean=(0.0003, -0.0002, 0.0, 0.0056, -0.0018, -0.0075, 0.8093, 0.0299, 0.1063),
    std=(0.1912, 0.1164, 0.0986, 0.4046, 0.3577, 0.2473, 0.411, 0.3979, 0.3345),
    permutation=0.3,
    crop=(0.25, 1.0),
    time_mask=0.3,
)


@dataclass(frozen=True)
class UciHar:
    """Windows of 128 steps at 50 Hz, 9 channels (g and rad/s), six activities, 30 subjects as groups.

    Consecutive windows of a recording overlap by half, and the files do not name the recordings: a run of windows of
    one subject that do overlap is taken for one here, and `recordings` holds out about a fifth of each subject's runs
    of each activity, at least one of two, so that all subjects can be clients and no test window overlaps a training
    one.

    Args:
        root: the folder `UCI HAR Dataset`, or the one that holds it.
        test: what is held out: "recordings", "file" (the official division: nine subjects) or "groups" (other
            subjects); "auto" is "file". Windows that overlap must not be divided at "random".
        test_fraction: about how much is held out, strictly between 0 and 1; not read by "file".
        augment: how views are drawn.

    Raises:
        ConfigError: an unknown word, or a share out of range.

    References:
        Anguita, Ghio, Oneto, Parra and Reyes-Ortiz 2013, ESANN, A public domain dataset for human activity recognition
        using smartphones (the licence forbids commercial use).
    """

    root: str
    test: str = "recordings"
    test_fraction: float = 0.2
    augment: TimeSeriesViews = VIEWS

    def __post_init__(self) -> None:
        check_test(self.test, self.test_fraction)

    def load(self) -> Data:
        """Reads the inertial signals and divides them, always in the same way.

        Raises:
            ConfigError: no such folder, a file is missing or is no table of numbers, or tables that do not fit.
        """
        given = Path(self.root).expanduser()
        folder = next((f for f in (given, given / "UCI HAR Dataset") if (f / "train").is_dir()), None)
        if folder is None:
            raise ConfigError(f"{self.root} has no folder train; pass data.root=/path/to/the/UCI HAR Dataset.")
        parts = [_part(folder, name) for name in ("train", "test")]
        if len({windows.shape[1:] for windows, _, _ in parts}) > 1:
            raise ConfigError(f"The windows of {folder} have several lengths; unpack the data set again.")
        windows, labels, subjects = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        targets, classes = numbered(labels, _names(folder / "activity_labels.txt"), str(folder))
        whole = Signals(as_signals(windows, False, f"The windows of {folder}"), targets, subjects)
        strata = np.unique(np.stack((subjects, labels), 1), axis=0, return_inverse=True)[1].reshape(-1)
        held = np.repeat([False, True], [len(windows) for windows, _, _ in parts])
        return divided(whole, classes, self.test, self.test_fraction, held, runs(windows, subjects), strata)


def runs(windows: Array, subjects: Array) -> Array:
    """(N,) the number of the run of each window (N, C, T): a new one begins where two windows share no half."""
    half = windows.shape[2] // 2
    joined = (windows[1:, :, :half] == windows[:-1, :, -half:]).all((1, 2)) & (subjects[1:] == subjects[:-1])
    return np.concatenate(([0], np.cumsum(~joined)))


def _part(folder: Path, part: str) -> tuple[Array, Array, Array]:
    """Windows (N, 9, T), labels (N,) and subjects (N,) of `train` or `test`."""
    tables = [_table(folder / part / "Inertial Signals" / f"{name}_{part}.txt") for name in CHANNELS]
    labels, subjects = (_table(folder / part / f"{kind}_{part}.txt").astype(np.int64) for kind in ("y", "subject"))
    n = len(tables[0])
    if len({table.shape for table in tables}) > 1 or labels.shape != (n, 1) or subjects.shape != (n, 1):
        shapes = ", ".join(str(table.shape) for table in (*tables, labels, subjects))
        raise ConfigError(
            f"The nine channels, the labels and the subjects of {folder / part} have shapes that do not fit: {shapes}; "
            "unpack the data set again."
        )
    return np.stack(tables, 1), labels[:, 0], subjects[:, 0]


def _table(path: Path) -> Array:
    """(N, T) float32 of a text file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an empty file
            return np.loadtxt(path, np.float32, ndmin=2)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {path}; unpack the whole data set again.") from error
    except (ValueError, UserWarning) as error:
        raise ConfigError(f"{path} is not a table of numbers ({error}); unpack the data set again.") from error


def _names(path: Path) -> tuple[str, ...]:
    """The activities in order of their numbers; none where the file is missing."""
    if not path.is_file():
        return ()
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) != 2 or not row[0].isdecimal() for row in rows):
        raise ConfigError(f"{path} does not hold a number and a name a line; unpack the data set again.")
    return tuple(name for _, name in sorted((int(number), name) for number, name in rows))
