"""The figures of one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from fedssl.report import collapse_figures
from fedssl.report.figures import collapse_curve, few_labels, loss_curve, points, probe_curve, save, spectrum
from fedssl.report.record import Record
from fedssl.report.split_figures import split_picture


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
