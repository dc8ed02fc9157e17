"""The figures of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedssl.measures.alarms import GAUGE, USED
from fedssl.report import collapse_figures
from fedssl.report.figures import COLOURS, HATCHES, Row, by_round, legend, line, new, plain, points, save, styled
from fedssl.report.record import Record
from fedssl.report.split_figures import split_picture

ENCODERS = (COLOURS[0], "#bbbbbb", COLOURS[4], COLOURS[3], COLOURS[2])  # the untrained one, which is second, is grey
# (name in probes.json, what it is); the order is that of the labels spent.
PROBES = (
    ("one_label", "one label a class"),
    ("five_labels", "five labels a class"),
    ("one_percent", "1 % of labels"),
    ("ten_percent", "10 % of labels"),
    ("linear", "all labels, linear"),
    ("knn", "all labels, kNN"),
)


def write(record: Record) -> list[Path]:
    """Draw all that a run has data for into its folder `figures`."""
    return [path for name, figure in drawings(record) for path in save(figure, record.path / "figures" / name)]


def drawings(record: Record) -> Iterator[tuple[str, Figure]]:
    """The figures that a run has data for, by name."""
    rows, spectra = record.rows, {name: values for name, values in record.spectra.items() if any(values)}
    if record.probes:
        yield "few_labels", few_labels(record.probes)
    if points(rows, "knn_accuracy")[0]:
        yield "probes", probe_curve(rows, record.summary.get("random_encoder_knn_accuracy"))
    if points(rows, "loss")[0]:
        yield "loss", loss_curve(rows)
    if points(rows, "rankme")[0]:
        yield "collapse", collapse_curve(rows, record.dim)
    if spectra:
        yield "spectrum", spectrum(spectra)
    if record.split.get("sizes"):
        yield "split", split_picture(record.split)
    yield from collapse_figures.drawings(record.parts)


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
        for axes, limit in ((upper, USED * dim), (lower, GAUGE)):
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
