"""Figures of several runs side by side: accuracies with intervals, curves, spectra, splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from fedssl.report import collapse_figures
from fedssl.report.configurations import Configuration
from fedssl.report.figures import COLOURS, Row, by_round, legend, line, new, plain, points, styled
from fedssl.report.run_figures import PROBES, few_labels, spectrum
from fedssl.report.split_figures import split_picture

_CURVES = (  # key of the rows, label of the axis, scale, what it is
    ("knn_accuracy", "kNN accuracy (%)", 100.0, "kNN accuracy"),
    ("rankme", "effective rank (RankMe)", 1.0, "Effective rank"),
    ("loss", "training loss (mean of clients)", 1.0, "Training loss"),
)
CURVES, SPECTRA, SPLITS, RESULTS = "By round", "Spectra", "Splits", "By labels"  # parts of a page


@dataclass(frozen=True)
class Drawing:
    """A figure, and where it belongs."""

    part: str  # of the page
    name: str  # of the file
    caption: str
    figure: Figure


def drawings(compared: Sequence[Configuration]) -> Iterator[Drawing]:
    """What the runs have data for."""
    yield from _accuracies(compared)
    yield from _curves(compared)
    yield from _spectra(compared)
    yield from _splits(compared)


def _accuracies(compared: Sequence[Configuration]) -> Iterator[Drawing]:
    bars: dict[str, dict[str, float]] = {}
    for one in compared:
        found = {key: one.interval(f"{key}_accuracy") for key, _ in PROBES}
        bars[one.label] = {
            f"{key}_{what}": value
            for key, interval in found.items()
            if interval is not None
            for what, value in zip(("accuracy", "std"), interval.bar, strict=True)
        }
    if bars := {label: values for label, values in bars.items() if values}:
        caption = "Accuracy by number of labels; whiskers are 95 % intervals over seeds, where there are several."
        yield Drawing(RESULTS, "accuracy", caption, few_labels(bars, COLOURS))


def _curves(compared: Sequence[Configuration]) -> Iterator[Drawing]:
    rows = {one.label: [run.rows for run in one.ended] for one in compared}
    methods = {one.runs[0].kind("method") for one in compared}
    for key, label, scale, what in _CURVES:
        if key == "loss" and len(methods) > 1:
            continue  # heights of different losses say nothing about each other
        if any(points(each, key)[0] for several in rows.values() for each in several):
            caption = f"{what} by round: a line is the mean of a configuration, its band the range of its runs."
            yield Drawing(CURVES, key, caption, overlay(rows, key, label, scale))


def _spectra(compared: Sequence[Configuration]) -> Iterator[Drawing]:
    found = {one.label: mean for one in compared if (mean := _mean_spectrum(one))}
    if found:
        caption = "Spectra of the final features: a cliff is dimensional collapse. Means over seeds."
        yield Drawing(SPECTRA, "spectrum", caption, spectrum(found))
    for one in compared:
        for name, figure in collapse_figures.drawings(one.ended[0].parts):
            if name == "spectra":
                caption = f"{one.label}: spectra over the rounds, dark to light{_which(one)}."
                yield Drawing(SPECTRA, f"spectra-{_file(one.label)}", caption, figure)


def _mean_spectrum(one: Configuration) -> list[float]:
    """Of the merged encoder, as shares of the largest eigenvalue."""
    each = [run.spectra.get("federated", ()) for run in one.ended]
    known = [[float(v or 0.0) / values[0] for v in values] for values in each if values and values[0]]
    same = [values for values in known if len(values) == len(known[0])]
    return [float(value) for value in np.mean(same, axis=0)] if same else []


def _splits(compared: Sequence[Configuration]) -> Iterator[Drawing]:
    """One picture for each split that there is; of a configuration, its first seed's."""
    shared: dict[str, list[Configuration]] = {}
    for one in compared:
        run = one.ended[0]
        if run.split.get("sizes"):
            shared.setdefault(str(run.manifest.get("split", {}).get("fingerprint", run.path)), []).append(one)
    for several in shared.values():
        first, who = several[0], "; ".join(one.label for one in several)
        caption = f"{'All' if len(several) == len(compared) else who}: who holds what{_which(first)}."
        name = "split" if len(shared) == 1 else f"split-{_file(first.label)}"
        yield Drawing(SPLITS, name, caption, split_picture(first.ended[0].split))


def _which(one: Configuration) -> str:
    return f", seed {one.ended[0].of('seed')}" if len(one.runs) > 1 else ""


def _file(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.=-]+", "_", label).strip("_")[:80]


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
