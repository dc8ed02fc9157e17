"""Figures of splits: who holds how many examples, and of which classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from fedssl.report.figures import COLOURS, new, plain, styled

_BUBBLES = 20  # clients and classes up to which a bubble is legible; beyond, a map of colours


@styled
def split_picture(split: Mapping[str, Any]) -> Figure:
    """Who holds what: examples of each class on each client, below the bars of the sizes."""
    sizes, every = np.asarray(split["sizes"]), split.get("every", 1)
    who = "client" if every == 1 else f"client / {every}"
    if "counts" not in split:
        figure, axes = new(2.4)
        _sizes(axes, sizes)
        axes.set_xlabel(who)
        return figure
    counts = np.asarray(split["counts"]).T  # (classes, clients)
    shape = {"sharex": True, "gridspec_kw": {"height_ratios": [1, 3]}}
    figure, (upper, lower) = new(min(4.4, 2.2 + 0.22 * len(counts)), nrows=2, **shape)
    _sizes(upper, sizes)
    if max(counts.shape) <= _BUBBLES:
        classes, clients = np.nonzero(counts)
        room = min(30.0 - counts.shape[1], 150.0 / counts.shape[0] + 4, 22.0)  # points across for the largest bubble
        area = counts[classes, clients] / counts.max() * room**2
        lower.scatter(clients, classes, s=area, color=COLOURS[0], alpha=0.75, linewidth=0)
        lower.set_xlim(-0.7, len(sizes) - 0.3)
        lower.set_ylim(len(counts) - 0.3, -0.7)
    else:
        shown = np.ma.masked_less(counts, 1)
        norm = LogNorm(vmin=1, vmax=max(2, int(counts.max())))
        image = lower.imshow(shown, norm=norm, cmap="viridis_r", aspect="auto", interpolation="nearest")
        lower.grid(False)
        figure.colorbar(image, ax=lower, label="examples", pad=0.02)
    _class_ticks(lower, split["classes"])
    lower.set_xlabel(who if max(counts.shape) > _BUBBLES else f"{who} (largest disc: {counts.max()} examples)")
    lower.set_ylabel("class")
    return figure


def _sizes(axes: Axes, sizes: np.ndarray) -> None:
    axes.bar(np.arange(len(sizes)), sizes, color="#888888", width=0.8 if len(sizes) <= 40 else 1.0)
    axes.set_ylabel("examples")
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True) if len(sizes) > _BUBBLES else FixedLocator(range(len(sizes)))
    )


def _class_ticks(axes: Axes, classes: Sequence[str]) -> None:
    step = math.ceil(len(classes) / _BUBBLES)
    at = list(range(0, len(classes), step))
    axes.set_yticks(at, [plain(classes[i], 14) for i in at], fontsize=7 if len(classes) > 12 else 8)
