"""Charts of studies: lines with error bars and bars, from plain numbers, in the style of the figures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedssl.report.figures import COLOURS, HATCHES, LINES, MARKERS, new, plain, styled

_TITLE = 64  # characters that fit above a panel


@dataclass(frozen=True)
class Line:
    """One curve; `error` is drawn as bars of that half-length; without `joined` there are only its points."""

    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    joined: bool = True


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
    shaded: bool = False  # curves of one kind in order, such as rounds: from dark to light, without markers


@styled
def chart(panels: Sequence[Panel | Sequence[Panel]]) -> Figure:
    """Panels below each other, or rows of panels side by side.

    One legend above all where it fits all, else one above each.
    """
    if any(not isinstance(panel, Panel) for panel in panels):
        return _grid([[panel] if isinstance(panel, Panel) else panel for panel in panels])
    return _column([panel for panel in panels if isinstance(panel, Panel)])


def _column(panels: Sequence[Panel]) -> Figure:
    """Panels below each other."""
    names = [[*panel.lines, *panel.bars, *panel.levels, *panel.marks] for panel in panels]
    most = max(names, key=len)
    shared = all(set(own) <= set(most) for own in names)
    columns = [_columns(own) for own in names]
    rows = [-(-len(own) // wide) for own, wide in zip(names, columns, strict=True)]
    height = 0.4 + 2.4 * len(panels) + 0.17 * (max(rows) if shared else sum(rows))
    figure, axes = new(height, nrows=len(panels), squeeze=False)
    for panel, place in zip(panels, axes[:, 0], strict=True):
        _draw(panel, place)
    for i, (panel, place) in enumerate(zip(panels, axes[:, 0], strict=True)):
        handles = dict(zip(*reversed(place.get_legend_handles_labels()), strict=True))  # by name
        shown = [handles[plain(name)] for name in names[i]]
        style: dict[str, Any] = {"ncols": columns[i], "columnspacing": 1.2, "handlelength": 2.4}
        if shared and names[i] is most and len(most) > 1:
            figure.legend(handles=shown, loc="outside upper left", **style)
        elif shown and not shared:
            place.set_title("", loc="left")  # the title goes above the legend, which would cover it
            style |= {"title": plain(panel.title, _TITLE) or None, "title_fontsize": 9, "alignment": "left"}
            place.legend(handles=shown, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, **style)
    return figure


def _grid(rows: Sequence[Sequence[Panel]]) -> Figure:
    """Rows of panels as wide as a page; a row of equal names has its legend above it, others one in each panel."""
    names = [[[*p.lines, *p.bars, *p.levels, *p.marks] for p in row] for row in rows]
    alike = [all(own == each[0] for own in each) and len(each[0]) > 1 for each in names]
    wide = [_fitting(each[0], 100) for each in names]
    above = [-(-len(each[0]) // n) if same else 0 for each, n, same in zip(names, wide, alike, strict=True)]
    heights = [2.4 + 0.17 * lines for lines in above]
    figure, _ = new(sum(heights))
    figure.clear()
    figure.set_figwidth(7.2)
    places = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, part, columns, same in zip(rows, places, wide, alike, strict=True):
        shared = len({panel.y for panel in row}) == 1
        for i, (panel, axes) in enumerate(
            zip(row, part.subplots(1, len(row), sharey=shared, squeeze=False)[0], strict=True)
        ):
            _draw(panel, axes)
            axes.set_ylabel("" if shared and i else panel.y)
            handles, labels = axes.get_legend_handles_labels()
            if same and i == 0:
                part.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2)
            elif len(labels) > 1 and not same:
                axes.legend(handles, labels, handlelength=2.4, labelspacing=0.3, loc="best")
    return figure


def _fitting(names: Sequence[str], room: int) -> int:
    """How many columns of a legend fit beside each other."""
    widest = max((len(plain(name)) for name in names), default=0) + 8  # the sample of its line
    return max(1, min(len(names), room // widest))


def _columns(names: Sequence[str]) -> int:
    """Of a legend: two where both fit beside each other."""
    half = -(-len(names) // 2)
    widths = [max((len(plain(name)) for name in part), default=0) for part in (names[:half], names[half:])]
    return 2 if sum(widths) <= 50 else 1


def _draw(panel: Panel, axes: Axes) -> None:
    for i, (name, line) in enumerate(panel.lines.items()):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)] if line.joined else "none",
            "markerfacecolor": "white" if i % 2 else None,
            "markevery": max(1, len(line.x) // 12) if line.joined else 1,
            "label": plain(name),
        }
        if panel.shaded:
            style |= {"color": colormaps["viridis"](0.9 * i / max(1, len(panel.lines) - 1)), "marker": "none",
                      "linestyle": "-"}  # fmt: skip
        if line.error is None:
            axes.plot(line.x, line.y, **style)
        else:
            axes.errorbar(line.x, line.y, yerr=line.error, capsize=2, elinewidth=1, **style)
    if panel.bars:
        _bars(panel, axes)
    for i, (name, value) in enumerate(panel.levels.items()):
        axes.axhline(value, color="#555555", linestyle=LINES[1 + i % (len(LINES) - 1)], linewidth=1, label=plain(name))
    for i, (name, value) in enumerate(panel.marks.items(), len(panel.levels)):
        axes.axvline(value, color="#555555", linestyle=LINES[1 + i % (len(LINES) - 1)], linewidth=1, label=plain(name))
    if panel.log_x:
        axes.set_xscale("log")
        _name_places(axes, {x for line in panel.lines.values() for x in line.x})
    elif panel.lines and all(float(x).is_integer() for line in panel.lines.values() for x in line.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if panel.title:
        axes.set_title(plain(panel.title, _TITLE), fontsize=9, loc="left")


def _name_places(axes: Axes, x: set[float]) -> None:
    """Ticks of a logarithmic axis at the places that were measured, where they are few."""
    if 1 < len(x) <= 10:
        axes.set_xticks(sorted(x), [f"{value:g}" for value in sorted(x)])
        axes.set_xticks([], minor=True)


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
