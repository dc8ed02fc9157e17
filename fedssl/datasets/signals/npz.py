"""Time series in one .npz file, with or without a division into training and test."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedssl.datasets.base import Data
from fedssl.datasets.signals.division import check_test, divided
from fedssl.datasets.signals.table import Array, Signals, as_signals, numbered
from fedssl.errors import ConfigError
from fedssl.modalities.timeseries import TimeSeriesViews

VIEWS = TimeSeriesViews()
LAYOUTS = ("channels_first", "channels_last")
GROUPS = ("groups", "subjects", "speakers", "patients", "users", "domains")
RECORDINGS = ("recordings", "experiments", "sessions")
CLASSES = ("class_names", "classes", "label_names")


@dataclass(frozen=True)
class SignalsNpz:
    """A .npz file, read without pickle, whose arrays have one of these names (P is `train_` and `test_`, or nothing).

    Series: `Psignals` as (N, C, T), (N, T, C) or (N, T), real numbers; or `x_train x_test x`, or with a capital X.
    Labels: `Plabels`, or `y_train y_test y`, whole numbers or words, or none. Groups for the natural partition:
    `Pgroups`, or subjects, speakers, patients, users, domains. Recordings: `Precordings`, or experiments, sessions.
    Names: `class_names`. The file's own division is `is_test`, or arrays of both parts.

    Args:
        path: the file.
        layout: of three-dimensional arrays: "channels_first" (N, C, T) or "channels_last" (N, T, C).
        groups: name of the array of groups, without P; null looks for the usual names.
        recordings: name of the array of recordings, without P; null looks for the usual names.
        test: what is held out: "file", "groups", "recordings", "random", or "auto" for the first of file, groups and
            random that the file allows; see `fedssl.datasets.signals.division.divided`. Series that overlap must not
            be divided at random.
        test_fraction: about how much is held out, strictly between 0 and 1; not read by "file".
        augment: how views are drawn.

    Raises:
        ConfigError: an unknown word, or a share out of range.
    """

    path: str
    layout: str = "channels_first"
    groups: str | None = None
    recordings: str | None = None
    test: str = "auto"
    test_fraction: float = 0.2
    augment: TimeSeriesViews = VIEWS

    def __post_init__(self) -> None:
        check_test(self.test, self.test_fraction)
        if self.layout not in LAYOUTS:
            raise ConfigError(f"data.layout is {self.layout!r}, which is not known; use {' or '.join(LAYOUTS)}.")

    def load(self) -> Data:
        """Reads the file and divides it, always in the same way.

        Raises:
            ConfigError: no such file, not such a file, or arrays that do not fit.
        """
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise ConfigError(f"There is no file {self.path}; pass data.path=/path/to/a/file.npz.")
        try:
            with file.open("rb") as stream:
                archive = np.load(stream, allow_pickle=False)
                if isinstance(archive, np.ndarray):
                    raise ValueError("it is a .npy file")
                return self._read(archive)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"{self.path} cannot be read as a .npz file without pickle ({error}); write it with numpy.savez."
            ) from error

    def _read(self, archive: Mapping[str, Array]) -> Data:
        parts: tuple[str, ...] = ("",)
        signals = [_first(archive, _series_names(""))]
        if signals[0] is None:
            parts = ("train", "test")
            signals = [_first(archive, _series_names(part)) for part in parts]
        found = [array for array in signals if array is not None]
        if len(found) < len(parts):
            raise ConfigError(
                f"{self.path} holds {', '.join(sorted(archive))}; name the series train_signals and test_signals, "
                "x_train and x_test, or signals."
            )
        series = [as_signals(array, self.layout == "channels_last", f"The series of {self.path}") for array in found]
        if len({one.shape[1:] for one in series}) > 1:
            raise ConfigError(
                f"The series of {self.path} for training have shape {tuple(series[0].shape)} and those for testing "
                f"{tuple(series[1].shape)}; an encoder needs one shape, so cut or pad them."
            )
        sizes = [len(one) for one in series]
        held = self._column(archive, parts, sizes, ("is_test",)) if parts == ("",) else np.repeat([False, True], sizes)
        labels = self._column(archive, parts, sizes, ("labels", "y"))
        names = next((tuple(str(name) for name in archive[key]) for key in CLASSES if key in archive), ())
        targets, classes = numbered(labels, names, self.path)
        groups = self._column(archive, parts, sizes, (self.groups,) if self.groups else GROUPS, bool(self.groups))
        named = (self.recordings,) if self.recordings else RECORDINGS
        recordings = self._column(archive, parts, sizes, named, bool(self.recordings))
        whole = Signals(torch.cat(series), targets, groups)
        return divided(
            whole, classes, self.test, self.test_fraction, None if held is None else held.astype(bool), recordings
        )

    def _column(
        self,
        archive: Mapping[str, Array],
        parts: Iterable[str],
        sizes: list[int],
        names: tuple[str, ...],
        needed: bool = False,
    ) -> Array | None:
        """(N,) one number or word per series over all parts; None where no part has one of these names."""
        found = []
        for part in parts:
            own = [f"{part}_{name}" if part else name for name in names]
            if "y" in names and part:
                own += [f"y_{part}", f"Y_{part}"]
            found.append(_first(archive, own))
        present = [column for column in found if column is not None]
        if not present and not needed:
            return None
        if len(present) < len(found):
            raise ConfigError(
                f"{self.path} holds {', '.join(sorted(archive))}, and {' or '.join(names)} of {len(present)} of "
                f"{len(found)} parts; give it for all series or for none."
            )
        for column, size in zip(present, sizes, strict=True):
            if column.size != size:
                raise ConfigError(
                    f"{names[0]} of {self.path} has shape {column.shape} for {size} series; give one per series."
                )
        return np.concatenate([column.reshape(-1) for column in present])


def _series_names(part: str) -> tuple[str, ...]:
    return (f"{part}_signals", f"x_{part}", f"X_{part}") if part else ("signals", "x", "X")


def _first(archive: Mapping[str, Array], names: Iterable[str]) -> Array | None:
    return next((archive[name] for name in names if name in archive), None)
