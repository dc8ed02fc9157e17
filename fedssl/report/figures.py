"""Figures: matplotlib without pyplot, told apart by shape as well as by colour, the same bytes twice."""

from __future__ import annotations

import io
import math
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
ENCODERS = (COLOURS[0], "#bbbbbb", COLOURS[4], COLOURS[3], COLOURS[2])  # the untrained one, which is second, is grey
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "xxx", "\\\\\\\\", "++", "--", "||")
# (name in probes.json, what it is); the order is that of the labels spent.
PROBES = (
    ("one_label", "one label a class"),
    ("five_labels", "five labels a class"),
    ("one_percent", "1 % of labels"),
    ("ten_percent", "10 % of labels"),
    ("linear", "all labels, linear"),
    ("knn", "all labels, kNN"),
)
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


@styled
def loss_curve(rows: Sequence[Row]) -> Figure:
    """Training loss by round: the mean of the clients, weighted by their examples."""
    figure, axes = new()
    line(axes, rows, "loss", 0, "loss")
    by_round(axes, "training loss (mean of clients)")
    return figure


@styled
def probe_curve(rows: Sequence[Row], random_encoder: float | None = None) -> Figure:
    """kNN accuracy by round: the merged encoder, the clients' before the merge, and the encoder before training."""
    figure, axes = new()
    line(axes, rows, "knn_accuracy", 0, "merged", 100)
    line(axes, rows, "client_knn_accuracy", 1, "clients before merging", 100)
    if random_encoder is not None:
        axes.axhline(100 * random_encoder, color="#555555", linestyle=":", label="random encoder")
    by_round(axes, "kNN accuracy (%)")
    legend(figure, axes)
    return figure


@styled
def collapse_curve(rows: Sequence[Row], dim: int | None = None) -> Figure:
    """Effective rank and feature spread by round, merged and before the merge; dotted where collapse begins.

    Args:
        rows: of metrics.jsonl.
        dim: D, the number of features; without it the standard deviation is not scaled and no limit is drawn.
    """
    figure, (upper, lower) = new(4.3, nrows=2, sharex=True)
    scale = math.sqrt(dim) if dim else 1.0
    for axes, key, factor in ((upper, "rankme", 1.0), (lower, "feature_std", scale)):
        line(axes, rows, key, 0, "merged", factor)
        line(axes, rows, f"client_{key}", 1, "clients before merging", factor)
        axes.set_ylim(0, 1.12 * max([*(line.get_ydata().max() for line in axes.get_lines()), 1e-6]))
    if dim:
        for axes, limit in ((upper, 0.05 * dim), (lower, 0.1)):
            axes.axhline(limit, color="#555555", linestyle=":", label="alarm below")
    upper.set_ylabel("effective rank (RankMe)" + (f"\nof {dim} dimensions" if dim else ""))
    by_round(lower, "feature std · √D\n(1 = even spread)" if dim else "feature std")
    legend(figure, upper)
    return figure


@styled
def spectrum(spectra: Mapping[str, Sequence[float | None]]) -> Figure:
    """Eigenvalues of the feature covariance, divided by the largest: a cliff is dimensional collapse."""
    figure, axes = new(2.9 + 0.17 * max(0, len(spectra) - 3))
    for i, (name, eigenvalues) in enumerate(spectra.items()):
        values = [v for v in eigenvalues if v is not None and v > 0]
        if values:
            rows = [{"round": at, "value": v / values[0]} for at, v in enumerate(values, 1)]
            line(axes, rows, "value", i, plain(name, 66))
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-8))
    axes.set_xlabel("index of the eigenvalue")
    axes.set_ylabel("eigenvalue / largest")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes)
    return figure


@styled
def few_labels(probes: Mapping[str, Mapping[str, float]], colours: Sequence[str] = ENCODERS) -> Figure:
    """Probe accuracy by the number of labels: one bar an encoder, with whiskers of `_std` to each side where it is."""
    shown = [(key, label) for key, label in PROBES if any(f"{key}_accuracy" in p for p in probes.values())]
    figure, axes = new(1.1 + max(0.52, 0.13 * len(probes)) * len(shown) + 0.17 * max(0, len(probes) - 3))
    height = 0.8 / len(probes)
    for i, (name, values) in enumerate(probes.items()):
        here = [(at, key) for at, (key, _) in enumerate(shown) if values.get(f"{key}_accuracy") is not None]
        axes.barh(
            [at - 0.4 + (i + 0.5) * height for at, _ in here],
            [100 * values[f"{key}_accuracy"] for _, key in here],
            xerr=[100 * (values.get(f"{key}_std") or math.nan) for _, key in here],
            height=height,
            color=colours[i % len(colours)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white" if i == 0 else "#333333",
            linewidth=0.6,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#222222"},
            label=plain(name, 66),
        )
    axes.set_yticks(range(len(shown)), [label for _, label in shown])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy (%)")
    legend(figure, axes)
    return figure


@styled
def overlay(curves: Mapping[str, Sequence[Sequence[Row]]], key: str, label: str, scale: float = 1.0) -> Figure:
    """One curve a configuration: the mean over its runs, and the band from the lowest run to the highest.

    Args:
        curves: name of a configuration -> the rows of each of its runs.
        key: of the rows.
        label: of the vertical axis, with its unit.
        scale: 100 for percent.
    """
    figure, axes = new(2.6 + 0.17 * len(curves))
    for i, (name, runs) in enumerate(curves.items()):
        by_number: dict[int, list[float]] = {}
        for rows in runs:
            for at, value in zip(*points(rows, key), strict=True):
                by_number.setdefault(at, []).append(value)
        everyone = max(map(len, by_number.values()), default=0)  # a round that a run has not reached is left out
        known = {at: values for at, values in sorted(by_number.items()) if len(values) == everyone}
        means = [{"round": at, key: float(np.mean(values))} for at, values in known.items()]
        line(axes, means, key, i, plain(name, 66), scale)
        if everyone > 1:
            low, high = ([scale * f(values) for values in known.values()] for f in (min, max))
            axes.fill_between(list(known), low, high, color=COLOURS[i % len(COLOURS)], alpha=0.18, linewidth=0)
    by_round(axes, label)
    legend(figure, axes)
    return figure


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
