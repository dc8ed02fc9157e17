"""Time series in one tensor, and what every source of them needs: checks, one layout, label numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Groups, Labels, Shard, check_columns
from fedssl.errors import ConfigError
from fedssl.method import Examples

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Signals:
    """Time series (N, C, T) as float32, in units of the data, with targets (N,) int64 and groups (N,), or None.

    Labels are read by probes and partitioners only.

    Raises:
        ConfigError: no series, values that are not finite, or arrays whose kinds or lengths do not fit.
    """

    signals: Tensor
    targets: Labels | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.signals.ndim != 3 or self.signals.dtype != torch.float32:
            raise ConfigError(
                f"Series of shape {tuple(self.signals.shape)} and type {self.signals.dtype} were found; "
                "give float32 of shape (N, C, T)."
            )
        if self.signals.numel() == 0:
            raise ConfigError("This data set holds no series, so nothing can be trained; give at least one.")
        bad = (~torch.isfinite(self.signals)).flatten(1).any(1)
        if bool(bad.any()):
            raise ConfigError(
                f"{int(bad.sum())} of {len(bad)} series hold values that are not finite, the first is series "
                f"{int(bad.nonzero()[0])}; fill the gaps or leave those series out."
            )
        check_columns(len(self), self.targets, self.groups)

    def __len__(self) -> int:
        return len(self.signals)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, T)."""
        return tuple(self.signals.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the series are."""
        return self.signals.device

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """A client's series."""
        return Shard.of(self, rows)

    def batch(self, index: Tensor) -> Tensor:
        """The series (B, C, T) float32 at (B,) int64 positions, copied, on the device."""
        return self.signals.index_select(0, index.to(self.signals.device))

    def to(self, device: str | torch.device) -> Signals:
        """The same data with its series on `device`."""
        return Signals(self.signals.to(device), self.targets, self.groups)

    def subset(self, index: Tensor | NDArray[np.int64]) -> Signals:
        """The examples at these positions, in this order, copied."""
        rows = torch.as_tensor(index, dtype=torch.int64).cpu()
        pick = rows.numpy()
        targets = None if self.targets is None else self.targets[pick]
        groups = None if self.groups is None else self.groups[pick]
        return Signals(self.signals.index_select(0, rows.to(self.signals.device)), targets, groups)

    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel: what data.augment.mean and data.augment.std can be set to."""
        variance, mean = torch.var_mean(self.signals.double(), (0, 2), correction=0)
        return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def as_signals(array: Array, channels_last: bool, where: str) -> Tensor:
    """Numbers (N, C, T), (N, T, C) if `channels_last`, or (N, T) of one channel, as float32 (N, C, T).

    Raises:
        ConfigError: another shape, or something else than real numbers; `where` names the array.
    """
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ConfigError(f"{where} are {array.dtype}; series must be stored as real numbers, so convert them.")
    if array.ndim == 2:
        array = array[:, None]
    elif array.ndim != 3:
        raise ConfigError(
            f"{where} have shape {array.shape}; give (N, C, T), or (N, T, C) with data.layout=channels_last, or (N, T)."
        )
    elif channels_last:
        array = array.transpose(0, 2, 1)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which `Signals` refuses
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def numbered(labels: Array | None, names: tuple[str, ...], where: str) -> tuple[Labels | None, tuple[str, ...]]:
    """Labels (N,) or (N, 1) as numbers from 0 on, with the names of the classes.

    Whole numbers below the number of `names` stay; any other whole numbers or words are numbered in sorted order, and
    name their class themselves where `names` are not as many.

    Raises:
        ConfigError: labels that are neither whole numbers nor words, or not one for each series.
    """
    if labels is None or labels.size == 0:
        return None, ()
    if labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)):
        labels = labels.astype(np.int64)
    if labels.size != len(labels) or labels.dtype.kind not in "iubU":
        raise ConfigError(
            f"The labels of {where} are {labels.dtype} of shape {labels.shape}; "
            "give one whole number or word per series."
        )
    flat = labels.reshape(-1)
    values, numbers = np.unique(flat, return_inverse=True)
    if values.dtype.kind != "U" and values[0] >= 0 and values[-1] < len(names):
        return flat.astype(np.int64), names
    return numbers.astype(np.int64), names if len(names) == len(values) else tuple(str(value) for value in values)
