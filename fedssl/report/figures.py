"""Figures: matplotlib without pyplot, told apart by shape as well as by colour, the same bytes twice."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from fedssl.files import write_bytes

P = ParamSpec("P")
Row = Mapping[str, Any]

# Okabe and Ito 2008, without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "xxx", "\\\\\\\\", "++", "--", "||")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.facecolor": "white",
    "svg.hashsalt": "fedssl",  # or the ids in the file are random
    "svg.fonttype": "path",  # a page looks the same where the font is missing
    "pdf.fonttype": 42,  # the font itself, which publishers ask for, not its outlines
}
_WIDE = 64  # characters of a legend in a figure of one column
FORMATS = ("pdf", "svg", "png")  # of files


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in our style, and leave matplotlib's settings as they were."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def new(height: float = 2.9, **panels: Any) -> tuple[Figure, Any]:
    """A figure one column wide (4.4 inches) and its panels."""
    figure = Figure(figsize=(4.4, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**panels)


def plain(name: object, limit: int = 40) -> str:
    """A name as the font can show it: no formula, no glyph that is missing, not too long."""
    glyphs = get_font(findfont("DejaVu Sans"))
    shown = "".join(c if glyphs.get_char_index(ord(c)) else "□" for c in str(name))
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return shown.replace("$", r"\$").removeprefix("_")  # matplotlib: $ begins a formula, _ hides from the legend


def points(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Rounds and values of a key, where it was measured."""
    found = [(row["round"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [r for r, _ in found], [v for _, v in found]


def line(axes: Axes, rows: Sequence[Row], key: str, index: int, label: str, scale: float = 1.0) -> None:
    """Draw one series of rows by round, told apart by colour, marker and dashes."""
    at, values = points(rows, key)
    if not at:
        return
    axes.plot(
        at,
        [v * scale for v in values],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=LINES[index % len(LINES)],
        markevery=max(1, len(at) // 12),
        markerfacecolor="white" if index % 2 else None,
        label=label,
    )


def by_round(axes: Axes, ylabel: str) -> None:
    """Label axes whose horizontal one counts rounds."""
    axes.set_xlabel("communication round")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:  # a single round
        axes.set_xlim(low - 0.5, high + 0.5)


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """The legend above all panels, where it covers no data, in so many columns or as many as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        fitting = next((n for n in range(columns, 1, -1) if _width(labels, n) <= _WIDE), 1)
        style = {"columnspacing": 1.2, "handlelength": 2.4}
        figure.legend(handles, labels, loc="outside upper left", ncols=fitting, **style)


def _width(labels: Sequence[str], columns: int) -> int:
    """Of a legend, in characters: matplotlib fills one column after another, the first ones with one label more."""
    parts = np.array_split(np.array([len(label) for label in labels]), columns)
    return sum(6 + int(part.max()) for part in parts if part.size)


def image(figure: Figure, kind: str, **settings: Any) -> bytes:
    """A figure as a file of that kind, of `FORMATS`, without date or version: equal figures, equal bytes.

    `settings` of matplotlib go before those of our style.
    """
    about = {"svg": {"Date": None, "Creator": "fedssl"}, "png": {"Software": "fedssl"}}
    pdf = {"CreationDate": None, "Creator": "fedssl", "Producer": "fedssl"}
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE | settings):
        figure.savefig(buffer, format=kind, dpi=150, metadata=about.get(kind, pdf))
    figure.set_layout_engine("none")  # found once, it serves every kind of file
    return buffer.getvalue()


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as `stem`.svg and, at 150 dots an inch, as `stem`.png."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for path in paths:
        write_bytes(path, image(figure, path.suffix[1:]))
    return paths


def publish(drawings: Iterable[tuple[str, Figure]], folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Write figures by their names for a paper, in these of `FORMATS`: text stays text, with its font in the PDF."""
    paths = []
    for name, figure in drawings:
        for kind in kinds:
            paths.append(folder / f"{name}.{kind}")
            write_bytes(paths[-1], image(figure, kind, **{"svg.fonttype": "none"}))
    return paths
