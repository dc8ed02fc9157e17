"""Several runs side by side: a table with intervals over seeds, and a page with their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedssl.files import number, write_text
from fedssl.intervals import Interval
from fedssl.report import comparison_figures, figures, page
from fedssl.report.configurations import Configuration, configurations
from fedssl.report.page import NOTHING, Html, decimal, percent, tag, text
from fedssl.report.record import Record
from fedssl.rundir import RunDirectory
from fedssl.tree import flatten

_SHARES = ("linear_accuracy", "knn_accuracy", "one_label_accuracy", "five_labels_accuracy")
HEADINGS = ("run", "configuration", "seed", "rounds", "linear %", "kNN %", "one label %", "five labels %",
            "effective rank", "MB up", "MB down", "seconds", "epsilon")  # fmt: skip
_MEAN = "mean of "
_NOTE = (
    "Test accuracies. In the row of a mean, ± is half of a 95 % interval (Student's t) over the finished runs that "
    "differ in nothing but their seed; a value without it is the same in all of them. MB are all that clients sent and "
    "were sent; epsilon is that of the unit in brackets, at its delta."
)


def table(runs: Sequence[RunDirectory]) -> list[list[str]]:
    """Runs side by side, as rows of text below their headings; the runs of a group of seeds are followed by their mean.

    Raises:
        ConfigError: there is no run.
        ResumeError: a run has no finished round, is damaged, or is no run.
    """
    return _table(configurations(runs))


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: without the columns in which all runs are alike, unless there is only one."""
    runs = [row for row in rows[1:] if not row[0].startswith(_MEAN)]
    told = [i for i in range(len(rows[0])) if i == 0 or len(runs) == 1 or len({row[i] for row in runs}) > 1]
    widths = {i: max(len(row[i]) for row in rows) for i in told}
    lines = ("  ".join(f"{row[i]:<{widths[i]}}" if i < 2 else f"{row[i]:>{widths[i]}}" for i in told) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def compare(
    runs: Sequence[RunDirectory], out: Path, folder: Path | None = None, kinds: Sequence[str] = ("pdf",)
) -> Path:
    """Write one page for several runs: their results, where their configurations differ, their figures.

    Args:
        runs: at least one.
        out: the page.
        folder: for the figures as files of these kinds, of `figures.FORMATS`, too.
        kinds: see `folder`.

    Raises:
        ConfigError: there is no run, or the page cannot be written.
        ResumeError: a run has no finished round, is damaged, or is no run.
    """
    compared = configurations(runs)
    rows = _table(compared)
    drawn = list(comparison_figures.drawings(compared))
    pictures: dict[str, list[tuple[bytes, str]]] = {}
    for drawing in drawn:
        pictures.setdefault(drawing.part, []).append((figures.image(drawing.figure, "svg"), drawing.caption))
    title = f"{_count(sum(len(one.runs) for one in compared), 'run')} of {_count(len(compared), 'configuration')}"
    parts = (comparison_figures.CURVES, comparison_figures.SPECTRA, comparison_figures.SPLITS)
    document = page.page(
        f"{title} · fedssl",
        tag("header", tag("p", text("fedssl")), tag("h1", text(_headline(title, compared)))),
        page.section("Results", *_results(rows, compared)),
        page.section("Where they differ", *_differences(compared)),
        page.section(comparison_figures.RESULTS, *page.gallery(pictures.get(comparison_figures.RESULTS, []))),
        *(page.section(part, *page.gallery(pictures.get(part, []))) for part in parts),
        page.section("Privacy", *_claims(compared)),
    )
    write_text(out, document)
    if folder is not None:
        figures.publish(((drawing.name, drawing.figure) for drawing in drawn), folder, kinds)
    return out


def _results(rows: Sequence[Sequence[str]], compared: Sequence[Configuration]) -> list[Html]:
    """The table; what all runs share is said below it."""
    means = [i for i, row in enumerate(rows) if row[0].startswith(_MEAN)]
    kinds = [_kinds(one.runs[0]) for one in compared]
    shared = " · ".join(column[0] for column in zip(*kinds, strict=True) if len(set(column)) == 1)
    note = f"All: {shared}. {_NOTE}" if shared else _NOTE
    return [page.table(rows, words=[1, len(rows[0]) - 1], means=means), tag("p", text(note), cls="note")]


def _kinds(run: Record) -> tuple[str, str, str]:
    return run.kind("method"), run.kind("strategy"), run.partition


def _headline(title: str, compared: Sequence[Configuration]) -> str:
    tops = [(top.mean, one.label) for one in compared if (top := one.interval("linear_accuracy")) is not None]
    if not tops:
        return f"{title}."
    best, label = max(tops, key=lambda pair: pair[0])
    return f"{title}: best linear probe {percent(best)}, {label}."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _table(compared: Sequence[Configuration]) -> list[list[str]]:
    rows = [list(HEADINGS)]
    for one in compared:
        name = one.name if len(compared) > 1 else " · ".join(_kinds(one.runs[0]))
        for run in one.runs:
            done, asked = run.summary["rounds"], run.of("federation", "rounds")
            rows.append(
                [
                    *(run.name, name, str(run.of("seed")), str(done) if run.done else f"{done} of {asked}"),
                    *(decimal(value, 1) for value in _values(run)),
                    _epsilon(run),
                ]
            )
        if len(one.ended) > 1:
            columns = zip(*(_values(run) for run in one.ended), strict=True)
            largest = max(one.ended, key=lambda run: number(run.summary.get("epsilon")) or 0.0)
            mean = f"{_MEAN}{len(one.ended)} runs"
            rows.append([mean, name, "", "", *map(_interval, columns), _epsilon(largest)])
    return rows


def _values(run: Record) -> list[float | None]:
    """The numbers of a table's row, from the linear probe to the time."""
    shares = [number(run.summary.get(key)) for key in _SHARES]
    sizes = [number(run.summary.get(key)) for key in ("bytes_up", "bytes_down")]
    return [
        *(None if share is None else 100 * share for share in shares),
        run.rank,
        *(None if size is None else size / 1e6 for size in sizes),
        number(run.summary.get("seconds")),
    ]


def _interval(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if len(set(found)) < 2:  # one run, or what no seed changes, such as bytes
        return decimal(found[0], 1) if found else NOTHING
    interval = Interval.of(found)
    return f"{decimal(interval.mean, 1)} ± {interval.half:.1f}"


def _epsilon(run: Record) -> str:
    """What is claimed, such as "3.46 (record, δ 1e-05)"."""
    epsilon = number(run.summary.get("epsilon"))
    if epsilon is None:
        return "none claimed"
    unit, delta = run.claim.get("unit"), number(run.claim.get("delta"))
    told = [str(unit)] * (unit is not None) + [f"δ {delta:g}"] * (delta is not None)
    return f"{epsilon:.2f}" + (f" ({', '.join(told)})" if told else "")


def _differences(compared: Sequence[Configuration]) -> list[Html]:
    """The keys of the configuration in which they differ."""
    flat = [dict(flatten(one.runs[0].config)) for one in compared]
    keys = sorted({key for each in flat for key in each if not key.startswith("track.")} - {"name", "out", "seed"})
    rows = [[key, *(str(each.get(key, NOTHING)) for each in flat)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    labels = [one.label for one in compared]
    return [page.table([["key", *labels], *rows], words=range(1, len(labels) + 1))] if rows else []


def _claims(compared: Sequence[Configuration]) -> list[Html]:
    """What each configuration claims, if any claims anything."""
    claims = [(one, one.ended[0].claim) for one in compared]
    if not any(number(one.ended[0].summary.get("epsilon")) is not None for one in compared):
        return []
    lines = (
        tag("li", tag("b", text(one.label)), tag("span", text(claim.get("says", "nothing is claimed"))))
        for one, claim in claims
    )
    return [tag("ul", *lines, cls="checks")]
