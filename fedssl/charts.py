"""Charts of studies: lines with error bars and bars, from plain numbers, in the style of the figures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedssl.figures import COLOURS, HATCHES, LINES, MARKERS, legend, new, plain, styled


@dataclass(frozen=True)
class Line:
    """One curve; `error` is drawn as bars of that half-length."""

    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes: curves, or groups of bars, with horizontal and vertical lines of reference."""

    x: str  # label of the axis, with its unit
    y: str
    lines: Mapping[str, Line] = field(default_factory=dict)
    bars: Mapping[str, Mapping[str, float | tuple[float, float]]] = field(default_factory=dict)
    # series -> place -> value, or (value, half-length of its error bar)
    levels: Mapping[str, float] = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    title: str = ""


@styled
def chart(panels: Sequence[Panel]) -> Figure:
    """Panels below each other."""
    figure, axes = new(0.4 + 2.5 * len(panels), nrows=len(panels), squeeze=False)
    for panel, place in zip(panels, axes[:, 0], strict=True):
        _draw(panel, place)
    named = max(axes[:, 0], key=lambda place: len(place.get_legend_handles_labels()[1]))
    everything = [set(place.get_legend_handles_labels()[1]) for place in axes[:, 0]]
    if all(names <= set(named.get_legend_handles_labels()[1]) for names in everything):
        legend(figure, named, 2)
    else:
        for place in axes[:, 0]:
            if place.get_legend_handles_labels()[1]:
                place.legend(loc="best")
    return figure


def _draw(panel: Panel, axes: Axes) -> None:
    for i, (name, line) in enumerate(panel.lines.items()):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
            "markerfacecolor": "white" if i % 2 else None,
            "markevery": max(1, len(line.x) // 12),
            "label": plain(name),
        }
        if line.error is None:
            axes.plot(line.x, line.y, **style)
        else:
            axes.errorbar(line.x, line.y, yerr=line.error, capsize=2, elinewidth=1, **style)
    if panel.bars:
        _bars(panel, axes)
    for i, (name, value) in enumerate(panel.levels.items()):
        axes.axhline(value, color="#555555", linestyle=LINES[1 + i % (len(LINES) - 1)], linewidth=1, label=plain(name))
    for i, (name, value) in enumerate(panel.marks.items()):
        axes.axvline(value, color="#555555", linestyle=LINES[1 + i % (len(LINES) - 1)], linewidth=1, label=plain(name))
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if panel.title:
        axes.set_title(plain(panel.title, 80), fontsize=9, loc="left")


def _bars(panel: Panel, axes: Axes) -> None:
    places = list(dict.fromkeys(place for values in panel.bars.values() for place in values))
    width = 0.8 / len(panel.bars)
    for i, (name, values) in enumerate(panel.bars.items()):
        known = [(places.index(place), value) for place, value in values.items()]
        heights = [value[0] if isinstance(value, tuple) else value for _, value in known]
        errors = [value[1] if isinstance(value, tuple) else 0.0 for _, value in known]
        axes.bar(
            [at + width * (i - (len(panel.bars) - 1) / 2) for at, _ in known],
            heights,
            width,
            yerr=errors if any(errors) else None,
            capsize=2,
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
            label=plain(name),
        )
    axes.set_xticks(range(len(places)), [plain(place, 24) for place in places])
