"""What every data source gives: examples in few tensors on one device, with labels and groups where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.method import Augment, Examples

Labels = NDArray[np.int64]
Groups = NDArray[Any]  # (N,) integers or names of authors, subjects, domains


class Table(Protocol):
    """Examples of one modality, with targets (N,) int64 and groups (N,), or None where there are none."""

    @property
    def targets(self) -> Labels | None:
        """(N,) int64 from 0 on; probes and partitions alone read them."""
        ...

    @property
    def groups(self) -> Groups | None:
        """(N,) authors, subjects or domains, which `natural` partitions keep together."""
        ...

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of one example, as an encoder must know it; of pairs, that of the first and that of the second."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        ...

    def __len__(self) -> int: ...
    def batch(self, index: Tensor) -> Any:
        """The examples at (B,) int64 positions, in floating point, on the device."""
        ...

    def to(self, device: str | torch.device) -> Table:
        """The same table on `device`."""
        ...

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """What a client with these rows trains on."""
        ...


@runtime_checkable
class Partial(Protocol):
    """A table of whose examples some clients have a part only, such as one of two modalities."""

    def untrained(self, client: int) -> tuple[str, ...]:
        """How the names of arrays begin that no gradient of this client reaches: ("encoder.second.",)."""
        ...


@dataclass(frozen=True, eq=False)
class Shard:
    """Some rows of a table that all clients of this process share on the device."""

    data: Table
    rows: Tensor

    @classmethod
    def of(cls, data: Table, rows: NDArray[np.int64]) -> Shard:
        """These rows."""
        return cls(data, torch.from_numpy(np.ascontiguousarray(rows)).to(data.device))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Any:
        """The examples at these positions of the shard."""
        return self.data.batch(self.rows[index])


def check_columns(n: int, targets: Labels | None, groups: Groups | None) -> None:
    """Refuse targets and groups that do not fit `n` examples.

    Raises:
        ConfigError: another length, or targets that are not int64 from 0 on.
    """
    for name, column in (("targets", targets), ("groups", groups)):
        if column is not None and column.shape != (n,):
            raise ConfigError(f"{name} has shape {column.shape} but there are {n} examples; give one per example.")
    if targets is not None and (targets.dtype != np.int64 or targets.min() < 0):
        raise ConfigError("targets must be int64 numbers from 0 on; pass None for examples without labels.")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images (N, C, H, W) as uint8, with targets (N,) int64 and groups (N,), or None where there are none.

    Labels are read by probes and partitioners only.

    Raises:
        ConfigError: no images, or arrays whose kinds or lengths do not fit.
    """

    images: Tensor
    targets: Labels | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ConfigError(
                f"Images of shape {tuple(self.images.shape)} and type {self.images.dtype} were found; "
                "give uint8 of shape (N, C, H, W)."
            )
        if self.images.numel() == 0:
            raise ConfigError("This data set holds no image, so nothing can be trained; give at least one.")
        check_columns(len(self), self.targets, self.groups)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """H, in pixels."""
        return self.images.shape[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def shard(self, rows: NDArray[np.int64], client: int) -> Examples:
        """A client's images."""
        return Shard.of(self, rows)

    def batch(self, index: Tensor) -> Tensor:
        """The images (B, C, H, W) at (B,) int64 positions, as float32 in [0, 1] on the images' device."""
        picked = self.images.index_select(0, index.to(self.images.device))
        return picked.to(torch.float32).div_(255)

    def to(self, device: str | torch.device) -> Dataset:
        """The same data with its images on `device`."""
        return Dataset(self.images.to(device), self.targets, self.groups)

    def subset(self, index: Tensor | NDArray[np.int64]) -> Dataset:
        """The examples at these positions, in this order, copied."""
        rows = torch.as_tensor(index, dtype=torch.int64).cpu()
        images = self.images.index_select(0, rows.to(self.images.device))
        pick = rows.numpy()
        targets = None if self.targets is None else self.targets[pick]
        return Dataset(images, targets, None if self.groups is None else self.groups[pick])


@dataclass(frozen=True, eq=False)
class Data:
    """A training set, a test set of the same kind of example, and the names of the classes (empty without labels).

    Raises:
        ConfigError: the two sets differ in shape, or a label has no name.
    """

    train: Any  # a Table; of images unless the source says otherwise
    test: Any
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise ConfigError(
                f"Training examples are {self.train.shape} but test examples are {self.test.shape}; "
                "an encoder needs one shape, so resize one of them."
            )
        for name, part in (("training", self.train), ("test", self.test)):
            if part.targets is not None and part.targets.max() >= len(self.classes):
                raise ConfigError(
                    f"A {name} label is {part.targets.max()} but there are {len(self.classes)} class names; "
                    "number the labels from 0 and name every class."
                )


class DataSource(Protocol):
    """A configured data set: a frozen dataclass whose fields say where it is and how its views are drawn."""

    @property
    def augment(self) -> Augment:
        """How views are drawn; its `modality` is that of the data."""
        ...

    def load(self) -> Data:
        """Reads or draws both parts; equal fields give equal bytes in every process."""
        ...
