"""Figures of the collapse monitor: ranks around each merge, spectra over the rounds, likeness of representations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedssl.measures.alarms import rounds
from fedssl.measures.outputs import CHAIN
from fedssl.report.figures import COLOURS, LINES, MARKERS, Row, by_round, legend, line, new, styled

_CURVES = 6  # spectra in a panel
_FLOOR = 1e-7  # of a spectrum; below it is rounding


def drawings(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """The figures that `collapse.jsonl` has data for, by name."""
    if _measured(rows):
        yield "ranks", ranks(rows)
        yield "spectra", spectra(rows)
        yield "agreement", agreement(rows)


def _measured(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each part of the merged model, as far as its outputs were measured."""
    merged = [row for row in rows if row["client"] == "merged" and row.get("rankme") is not None]
    return {part: own for part in CHAIN if (own := [row for row in merged if row["part"] == part])}


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure, axes = new(0.7 + height * count, nrows=count, squeeze=False, sharex=True)
    return figure, list(axes[:, 0])


@styled
def ranks(rows: Sequence[Row]) -> Figure:
    """The rank of each part in a round: where it began, of clients after training, of what they were merged to.

    Args:
        rows: of `collapse.jsonl`, as in the other figures.
    """
    parts = _measured(rows)
    figure, panels = _panels(len(parts), 1.7)
    for (part, merged), axes in zip(parts.items(), panels, strict=True):
        middle = [{"round": at, "rankme": seen.client_rank(part)} for at, seen in rounds(rows)]
        line(axes, merged, "rankme_before", 2, "at the round's start")
        line(axes, middle, "rankme", 1, "median client after training")
        line(axes, merged, "rankme", 0, "merged")
        spread = {at: own for at, seen in rounds(rows) if (own := seen.client_ranks(part))}
        low, high = ([pick(own) for own in spread.values()] for pick in (min, max))
        axes.fill_between(list(spread), low, high, color=COLOURS[1], alpha=0.18, linewidth=0)
        axes.set_ylim(0, 1.1 * max([*high, *(row["rankme"] for row in merged)]))
        by_round(axes, f"{part}\nrank (RankMe)")
        axes.label_outer()
    legend(figure, panels[0], 2)
    return figure


@styled
def spectra(rows: Sequence[Row]) -> Figure:
    """Eigenvalues of each merged part's covariance as shares of the outputs' length, at some rounds, dark to light."""
    parts = _measured(rows)
    figure, panels = _panels(len(parts), 1.9)
    for (part, merged), axes in zip(parts.items(), panels, strict=True):
        last = len(merged) - 1
        chosen = sorted({round(i * last / (_CURVES - 1)) for i in range(_CURVES)})
        for i, at in enumerate(chosen):
            values = [v for v in merged[at]["spectrum"] if v is not None and v > _FLOOR]
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=colormaps["viridis"](0.85 * i / max(1, len(chosen) - 1)),
                linestyle=LINES[i % len(LINES)],
                marker=MARKERS[i % len(MARKERS)],
                markevery=(i, 8),
                label=f"round {merged[at]['round']}",
            )
        axes.set_yscale("log")
        axes.set_ylabel(f"{part}\neigenvalue / length²")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("index of the eigenvalue")
    legend(figure, panels[0])
    return figure


@styled
def agreement(rows: Sequence[Row]) -> Figure:
    """Linear CKA between clients before the merge, from each of them to the merged model, and from round to round."""
    parts = _measured(rows)
    figure, panels = _panels(len(parts), 1.7)
    for (part, merged), axes in zip(parts.items(), panels, strict=True):
        line(axes, merged, "cka_round", 2, "merged, before and after the round")
        line(axes, merged, "cka_clients", 1, "client to client")
        line(axes, merged, "cka_global", 0, "client to merged")
        axes.set_ylim(0, 1.05)
        by_round(axes, f"{part}\nlinear CKA")
        axes.label_outer()
    legend(figure, panels[0], 2)
    return figure
