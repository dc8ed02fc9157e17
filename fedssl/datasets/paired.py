"""Examples in two modalities: spoken and written digits, any two arrays of a .npz file, and drawn ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.datasets.base import Data, Groups, Labels, Shard, check_columns
from fedssl.datasets.npz import CLASSES, GROUPS, SPLIT_SEED, TEST_FRACTION, open_npz
from fedssl.datasets.pixels import channels_first
from fedssl.datasets.split import Indices, stratified
from fedssl.datasets.synthetic import Synthetic
from fedssl.errors import ConfigError
from fedssl.method import Examples
from fedssl.modalities.images import ImageViews
from fedssl.modalities.pairs import SIDES, Pair, PairViews

Array = NDArray[Any]
BOTH = ("both",)
SHAPES = ImageViews(crop=(0.4, 1.0), saturation=0.0, hue=0.0, grey=0.0, mean=(0.5,), std=(0.25,))
# Time and pitch may shift a little, but a sound is not mirrored.
SOUNDS = ImageViews(
    crop=(0.6, 1.0), translate=0.1, flip=0.0, saturation=0.0, hue=0.0, grey=0.0, noise=0.05, padding="zeros",
    mean=(0.294,), std=(0.31,),
)  # fmt: skip
WRITING = ImageViews(
    crop=(0.6, 1.0), rotation=15.0, translate=0.06, flip=0.0, saturation=0.0, hue=0.0, grey=0.0, noise=0.05,
    padding="zeros", mean=(0.1307,), std=(0.3081,),
)  # fmt: skip
SPOKEN_WRITTEN, TWO_IMAGES, SHAPES_TONES = (
    PairViews(SOUNDS, WRITING),
    PairViews(SHAPES, SHAPES),
    PairViews(SHAPES, SOUNDS),
)


@dataclass(frozen=True, eq=False)
class Column:
    """One modality as one tensor (N, ...): uint8 is given as float32 in [0, 1], floating point as it is."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.values.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    def batch(self, index: Tensor) -> Tensor:
        """The examples (B, ...) at (B,) int64 positions, as float32 on the values' device."""
        picked = self.values.index_select(0, index.to(self.values.device))
        return picked.to(torch.float32).div_(255) if picked.dtype == torch.uint8 else picked

    def subset(self, index: Indices) -> Column:
        """These examples, copied."""
        return Column(self.values.index_select(0, torch.from_numpy(index).to(self.values.device)))

    def to(self, device: str | torch.device) -> Column:
        """The same on `device`."""
        return Column(self.values.to(device))


@dataclass(frozen=True, eq=False)
class Pairs:
    """A table of N examples in two modalities.

    Client k has what `holds[k % len(holds)]` says: both, first or second; the other modality of its rows is never read.
    Evaluation, public examples and the central baseline have both.

    Attributes:
        first, second: the modalities, row by row: `Column`, images, time series or any table with `subset`.
        targets, groups: of the examples.
        holds: words, at least one.
        sides: the modalities that `batch` gives.

    Raises:
        ConfigError: modalities or columns of different lengths, or an unknown word.
    """

    first: Any
    second: Any
    targets: Labels | None = None
    groups: Groups | None = None
    holds: tuple[str, ...] = BOTH
    sides: tuple[str, ...] = SIDES

    def __post_init__(self) -> None:
        if len(self.first) != len(self.second) or not len(self.first):
            raise ConfigError(
                f"the first modality has {len(self.first)} examples and the second {len(self.second)}; "
                "give the same number of both, at least one"
            )
        check_columns(len(self), self.targets, self.groups)
        if not self.holds or not set(self.holds) <= {"both", *SIDES}:
            raise ConfigError(
                f"data.holds is {list(self.holds)}, but the clients take its words in turn; use both, first and second."
            )

    def __len__(self) -> int:
        return len(self.first)

    @property
    def shape(self) -> tuple[Any, ...]:
        """That of the first and that of the second."""
        return self.first.shape, self.second.shape

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        device: torch.device = self.first.device
        return device

    def batch(self, index: Tensor) -> Pair:
        """The examples at (B,) int64 positions, with the modalities of `sides`."""
        first = self.first.batch(index) if "first" in self.sides else None
        return Pair(first, self.second.batch(index) if "second" in self.sides else None)

    def to(self, device: str | torch.device) -> Pairs:
        """The same on `device`."""
        return replace(self, first=self.first.to(device), second=self.second.to(device))

    def only(self, *sides: str) -> Pairs:
        """The same examples in these modalities."""
        return replace(self, sides=sides)

    def subset(self, index: Indices) -> Pairs:
        """These examples, copied."""
        first, second = self.first.subset(index), self.second.subset(index)
        targets, groups = (None if column is None else column[index] for column in (self.targets, self.groups))
        return replace(self, first=first, second=second, targets=targets, groups=groups)

    def shard(self, rows: Indices, client: int) -> Examples:
        """A client's rows in the modalities that it has."""
        return Shard.of(self.only(*self._held(client)), rows)

    def untrained(self, client: int) -> tuple[str, ...]:
        """The tower that no gradient of this client reaches, if it lacks a modality."""
        return tuple(f"encoder.{side}." for side in SIDES if side not in self._held(client))

    def _held(self, client: int) -> tuple[str, ...]:
        word = self.holds[client % len(self.holds)]
        return SIDES if word == "both" else (word,)


@dataclass(frozen=True)
class SpokenWritten:
    """Spoken digits as log-mel spectrograms (1, 40, 64), paired with written ones (1, 28, 28), by six speakers.

    The file holds `logmel_u8`, `images` with five MNIST images a recording, `labels`, `speakers` and `is_test`. Which
    image belongs to a recording is drawn, so pairs share the digit and nothing else: a contrastive loss takes the other
    pairs of the same digit in a batch, about one in ten, for negatives.

    Args:
        path: the file.
        image: which of the five images, 0 to 4.
        holds: which modalities the clients have, in turn: both, first (sound) or second (writing).
        augment: how views are drawn.

    References:
        Jackson et al., Free Spoken Digit Dataset, https://github.com/Jakobovski/free-spoken-digit-dataset; LeCun et al.
        1998, MNIST.
    """

    path: str
    image: int = 0
    holds: tuple[str, ...] = BOTH
    augment: PairViews = SPOKEN_WRITTEN

    def load(self) -> Data:
        """Reads the file.

        Raises:
            ConfigError: no such file, or another one.
        """
        with open_npz(self.path) as archive:
            images = _array(archive, "images", self.path)
            if images.ndim != 4 or not 0 <= self.image < images.shape[1]:
                raise ConfigError(f"data.image={self.image} is not among the images {images.shape}; use 0 to 4.")
            sides = _array(archive, "logmel_u8", self.path), images[:, self.image]
            rows = _Rows(*(_array(archive, name, self.path) for name in ("labels", "speakers", "is_test")))
        return rows.divide(sides, self.holds, tuple("0123456789"), self.path)


@dataclass(frozen=True)
class PairsNpz:
    """Two arrays of equal length in a .npz file, read without pickle, row by row the same example.

    A modality is uint8 images as (N, H, W), (N, H, W, C) or (N, C, H, W), or floating-point numbers (N, ...), taken as
    they are. Labels, if any, are `labels`, groups one of `groups, domains, subjects, speakers, writers`, names of
    classes `class_names`. The rows are divided by `is_test`, else a stratified fifth is held out, always the same.

    Args:
        path: the file.
        first, second: names of the arrays.
        holds: which modalities the clients have, in turn: both, first or second.
        augment: how views of each modality are drawn.
    """

    path: str
    first: str = "first"
    second: str = "second"
    holds: tuple[str, ...] = BOTH
    augment: PairViews = TWO_IMAGES

    def load(self) -> Data:
        """Reads the file.

        Raises:
            ConfigError: no such file, or arrays that do not fit.
        """
        with open_npz(self.path) as archive:

            def column(*names: str) -> Array | None:
                return next((archive[name] for name in names if name in archive), None)

            sides = _array(archive, self.first, self.path), _array(archive, self.second, self.path)
            rows, names = _Rows(column("labels"), column(*GROUPS), column("is_test")), column(*CLASSES)
        return rows.divide(sides, self.holds, () if names is None else tuple(map(str, names)), self.path)


@dataclass(frozen=True)
class _Rows:
    """What a file says of its rows."""

    labels: Array | None
    groups: Array | None
    held: Array | None

    def divide(self, sides: Sequence[Array], holds: tuple[str, ...], names: tuple[str, ...], path: str) -> Data:
        """Training and test pairs of two arrays."""
        n = len(sides[0])
        if self.labels is not None and (not np.issubdtype(self.labels.dtype, np.integer) or self.labels.ndim != 1):
            raise ConfigError(
                f"The labels of {path} are {self.labels.dtype} {self.labels.shape}; give one whole number a row."
            )
        targets = None if self.labels is None else self.labels.astype(np.int64)
        if self.held is None:
            train, test = stratified(n if targets is None else targets, TEST_FRACTION, SPLIT_SEED)
        elif self.held.shape == (n,) and 0 < np.count_nonzero(self.held) < n:
            train, test = (np.flatnonzero(held) for held in (self.held == 0, self.held != 0))
        else:
            raise ConfigError(f"is_test of {path} does not divide its {n} rows; say of each row whether it is a test.")
        first, second = (_column(side, path) for side in sides)
        whole = Pairs(first, second, targets, self.groups, holds)
        top = -1 if targets is None else int(targets.max())
        return Data(whole.subset(train), whole.subset(test), names or tuple(str(label) for label in range(top + 1)))


def _array(archive: Mapping[str, Array], name: str, path: str) -> Array:
    if name not in archive:
        raise ConfigError(f"{path} has no array {name!r} but {', '.join(sorted(archive))}; name one that it has.")
    return archive[name]


def _column(array: Array, path: str) -> Column:
    if np.issubdtype(array.dtype, np.floating) and array.ndim > 1 and np.isfinite(array).all():
        return Column(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))
    if array.dtype != np.uint8:
        raise ConfigError(
            f"A modality of {path} is {array.dtype} of shape {array.shape}; give uint8 images or finite floating-point "
            "numbers (N, ...)."
        )
    return Column(channels_first(array, f"a modality of {path}"))


@dataclass(frozen=True)
class SyntheticPairs:
    """A drawn shape paired with a drawn tone of the same class by the same author, both grey.

    The shape is that of `Synthetic`. The tone is a curve in the plane of pitch (down) and time (across): class k has
    contour k % 5 (flat, rising, falling, peak, valley) and timbre k % 4 (plain, overtone, pulsed, vibrato); an author
    has a pitch and a tempo.

    Args:
        train, test: number of pairs.
        classes: 2 to 20.
        size: side of both in pixels, at least 8.
        seed: of the data set, not of the run.
        holds: which modalities the clients have, in turn: both, first (shape) or second (tone).
        augment: how views are drawn.

    Raises:
        ConfigError: a number out of range.
    """

    train: int = 1000
    test: int = 300
    classes: int = 10
    size: int = 16
    seed: int = 0
    holds: tuple[str, ...] = BOTH
    augment: PairViews = SHAPES_TONES

    def __post_init__(self) -> None:
        self._shapes()

    def _shapes(self) -> Synthetic:
        return Synthetic(self.train, self.test, self.classes, self.size, 1, self.seed, SHAPES)

    def load(self) -> Data:
        """Draws both parts; equal fields give equal pairs."""
        shapes = self._shapes().load()
        rng = np.random.default_rng((self.seed, 1))
        parts = []
        for part in (shapes.train, shapes.test):
            tones = Column(torch.from_numpy(draw_tones(part.targets, part.groups, self.size, rng)))
            parts.append(Pairs(Column(part.images), tones, part.targets, part.groups, self.holds))
        return Data(parts[0], parts[1], shapes.classes)


def draw_tones(targets: Labels, authors: Labels, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(N, 1, size, size) tones of these classes by these authors (0 to 19); see `SyntheticPairs`."""
    n = len(targets)
    t = np.linspace(0, 1, size)
    bend = np.stack([0 * t, t - 0.5, 0.5 - t, 0.5 - np.abs(2 * t - 1), np.abs(2 * t - 1) - 0.5])  # (5, size)
    timbre = (targets % 4)[:, None]
    tempo, phase = 2 * np.pi * (3 + authors % 3)[:, None], rng.uniform(0, 2 * np.pi, (n, 1))
    wave = np.sin(tempo * t + phase)  # (N, size)
    pitch = 0.5 + 0.01 * (authors[:, None] - 9.5) + rng.uniform(-0.05, 0.05, (n, 1))
    track = pitch - 0.45 * bend[targets % 5] + np.where(timbre == 3, 0.08 * wave, 0)
    loud = rng.uniform(0.7, 1, (n, 1)) * np.where(timbre == 2, wave > 0, 1)
    down = (np.arange(size)[:, None] + 0.5) / size  # (size, 1)

    def ridge(centre: Array) -> Array:
        return np.asarray(np.exp(-(((down - centre[:, None]) / 0.06) ** 2)))  # (N, size, size)

    tones = ridge(track) + np.where(timbre == 1, 0.8, 0)[:, None] * ridge(track - 0.25)
    tones = tones * loud[:, None] + 0.05 * rng.standard_normal((n, size, size))
    pixels: NDArray[np.uint8] = np.rint(255 * np.clip(tones, 0, 1)).astype(np.uint8)
    return pixels[:, None]
