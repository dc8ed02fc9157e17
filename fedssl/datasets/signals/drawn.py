"""Drawn time series: waveforms in twenty subjects' styles, made from a seed, of any length and number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedssl.datasets.base import Data
from fedssl.datasets.signals.table import Array, Signals
from fedssl.errors import ConfigError
from fedssl.modalities.timeseries import TimeSeriesViews

VIEWS = TimeSeriesViews()
WAVES: tuple[tuple[str, Callable[[Array], Array]], ...] = (  # of cycles; about zero mean and unit variance
    ("sine", lambda t: 1.41 * np.sin(2 * np.pi * t)),
    ("square", lambda t: np.where(t % 1 < 0.5, 1.0, -1.0)),
    ("triangle", lambda t: 6.93 * np.abs(t % 1 - 0.5) - 1.73),
    ("saw", lambda t: 3.46 * (t % 1) - 1.73),
    ("pulses", lambda t: np.where(t % 1 < 0.15, 2.38, -0.42)),
    ("two tones", lambda t: np.sin(2 * np.pi * t) + np.sin(6 * np.pi * t)),
    ("beats", lambda t: 2 * np.sin(2 * np.pi * t) * np.sin(np.pi * t / 4)),
    ("arches", lambda t: 3.25 * np.abs(np.sin(np.pi * t)) - 2.07),
)


@dataclass(frozen=True)
class SyntheticSignals:
    """Class k is a waveform, at a random phase in noise; a subject is a tempo, and gains, levels and lags of channels.

    Subjects are the groups for `natural` partitions; both parts share them.

    Args:
        train, test: number of series.
        classes: 2 to 8.
        channels: at least 1.
        steps: length of a series, at least 16.
        subjects: at least 1.
        noise: standard deviation of the added noise; the waves' own is about 1.
        seed: of the data set, not of the run.
        augment: how views are drawn.

    Raises:
        ConfigError: a number out of range.
    """

    train: int = 2000
    test: int = 500
    classes: int = 6
    channels: int = 3
    steps: int = 96
    subjects: int = 20
    noise: float = 0.3
    seed: int = 0
    augment: TimeSeriesViews = VIEWS

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(WAVES):
            raise ConfigError(
                f"Synthetic signals have 2 to {len(WAVES)} classes, not {self.classes}; choose classes in this range."
            )
        if min(self.train, self.test, self.channels, self.subjects) < 1 or self.steps < 16 or not self.noise >= 0:
            raise ConfigError(
                f"Synthetic signals of {self.train} + {self.test} series, {self.channels} channels, {self.steps} "
                f"steps, {self.subjects} subjects and noise {self.noise} cannot be drawn; use at least 1 of each, 16 "
                "steps, and noise of at least 0."
            )

    def load(self) -> Data:
        """Draws both parts; equal fields give equal series."""
        rng = np.random.default_rng(self.seed)
        shape = (self.subjects, self.channels, 1)
        style = {
            "tempo": rng.uniform(2.0, 5.0, (self.subjects, 1, 1)),  # cycles in a series
            "gain": rng.uniform(0.5, 2.0, shape),
            "level": rng.normal(0.0, 1.0, shape),
            "lag": rng.uniform(0.0, 0.5, shape),  # of a cycle
        }
        train, test = (self._draw(n, style, rng) for n in (self.train, self.test))
        return Data(train, test, tuple(name for name, _ in WAVES[: self.classes]))

    def _draw(self, n: int, style: dict[str, Array], rng: np.random.Generator) -> Signals:
        targets = rng.permutation(np.arange(n) % self.classes).astype(np.int64)
        subjects = rng.integers(0, self.subjects, n)
        tempo = style["tempo"][subjects] * rng.uniform(0.9, 1.1, (n, 1, 1))
        cycles = tempo * np.linspace(0, 1, self.steps) + rng.uniform(0, 8, (n, 1, 1)) + style["lag"][subjects]
        waves = np.empty_like(cycles)  # (n, channels, steps)
        for label in range(self.classes):
            rows = targets == label
            waves[rows] = WAVES[label][1](cycles[rows])
        series = style["gain"][subjects] * waves + style["level"][subjects] + rng.normal(0, self.noise, waves.shape)
        return Signals(torch.from_numpy(series.astype(np.float32)), targets, subjects.astype(np.int64))
