"""Reports: one run, or several side by side, as a web page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedssl import collapse_figures, figures, page, payload, retrieval
from fedssl.alarms import Alarm
from fedssl.errors import ConfigError, ResumeError
from fedssl.files import number, write_text
from fedssl.page import NOTHING, Html, decimal, percent, tag, text
from fedssl.record import Check, Record, collapse_checks
from fedssl.rundir import NOT_THE_JOB, RunDirectory
from fedssl.tree import flatten

CAPTIONS = {
    "few_labels": "Accuracy by number of labels: the gap between the federated bar and the random encoder's is what "
    "pretraining is worth.",
    "loss": "Training loss by round: it should fall and level off; its height compares only within one method.",
    "probes": "kNN accuracy by round: the solid line above the dashed one means that merging helps.",
    "collapse": "Collapse by round: both curves should stay well above the dotted lines; a fall means that features "
    "shrink to fewer directions.",
    "spectrum": "Spectrum of the features: a slow decline uses many directions, a cliff is dimensional collapse.",
    "ranks": "Rank by round and part: clients below where they began mean that local training loses directions, merged "
    "below the clients that merging does.",
    "spectra": "Spectra over the rounds: curves that sink and get steeper are a collapse as it happens.",
    "agreement": "Likeness of representations (linear CKA) by round: clients that drift apart fall below 1.",
    "split": "Who holds what: equal columns are an even split, few discs or cells a column a skewed one.",
}
COLUMNS = ("linear_accuracy", "knn_accuracy", "one_label_accuracy", "five_labels_accuracy")
HEADINGS = ("run", "method", "strategy", "partition", "seed", "rounds", "linear %", "kNN %", "one label %",
            "five labels %", "effective rank", "MB", "seconds", "epsilon")  # fmt: skip


def _begun(run: RunDirectory) -> Record:
    record = Record.read(run)
    if not record.rows:
        raise ResumeError(
            f"{run.path} has no finished round, so there is nothing to report: `fedssl resume {run.path}` first"
        )
    return record


def finish_report(run: RunDirectory) -> Path:
    """Draw a run's figures and write its `report.html`.

    Raises:
        ResumeError: the run has no finished round, is damaged, or is no run.
    """
    record = _begun(run)
    drawn = [*figures.write_figures(run), *collapse_figures.write(record)]
    pictures = [(p.read_bytes(), CAPTIONS[p.stem]) for p in drawn if p.suffix == ".svg"]
    checks = collapse_checks(record)
    document = page.page(
        f"{record.name} · fedssl",
        tag(
            "header",
            tag("p", text(record.name)),
            tag("h1", text(_headline(record))),
            tag("p", text(_setting(record))),
            *(_alarm(alarm) for alarm in record.lasting),
        ),
        tag("div", *_tiles(record), cls="tiles"),
        page.section("What the encoder is worth", *_probe_table(record)),
        page.section("Collapse check", *_checks(checks)),
        page.section("Figures", *_figures(pictures)),
        page.section("Split", *_split(record)),
        page.section("What leaves a client", *_payload(record)),
        page.section(
            "How it was made",
            page.folded("Configuration", yaml.safe_dump(dict(record.config), sort_keys=False, allow_unicode=True)),
            page.folded("Manifest", json.dumps(record.manifest, indent=2, ensure_ascii=False)),
        ),
    )
    write_text(run.path / "report.html", document)
    return run.path / "report.html"


def _alarm(alarm: Alarm) -> Html:
    since = f"Alarm since round {alarm.round}: {alarm.name} ({alarm.part}). "
    return tag("p", tag("b", text(since)), text(f"{alarm.found} {alarm.cause} {alarm.remedy}"), cls="alarm")


def _headline(record: Record) -> str:
    """The result in one sentence."""
    if not record.done:
        return f"Not finished: {record.summary['rounds']} of {record.of('federation', 'rounds')} rounds so far."
    for key, amount in (("one_label", "one label a class"), ("linear", "all labels"), ("knn", "all labels and kNN")):
        mine = number(record.summary.get(f"{key}_accuracy"))
        if mine is not None:
            against = [
                _against(mine, number(record.summary.get(f"{prefix}_{key}_accuracy")), name)
                for prefix, name in (("random_encoder", "a random encoder"), ("central", "central training"))
            ]
            told = ", ".join(sentence for sentence in against if sentence)
            start = f"With {amount}, the federated encoder gets {percent(mine)} of the test examples right"
            return f"{start}: {told}." if told else f"{start}."
    rank = f"effective rank {decimal(record.rank, 1)}" + (f" of {record.dim}" if record.dim else "")
    loss = decimal(record.summary.get("loss"), 3)
    return f"Pretrained for {record.summary['rounds']} rounds, with no labels to measure it on: loss {loss}, {rank}."


def _against(mine: float, other: float | None, name: str) -> str:
    if other is None:
        return ""
    gap = 100 * (mine - other)
    if abs(gap) < 0.05:
        return f"level with {name}"
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'} {name}"


def _setting(record: Record) -> str:
    clients = record.of("federation", "clients")
    parts = [
        record.kind("method"),
        record.kind("strategy"),
        record.kind("data"),
        record.partition,
        f"{clients} clients",
    ]
    made = [
        f"seed {record.of('seed')}",
        str(record.manifest.get("device", "")),
        f"fedssl {record.manifest.get('fedssl')}",
    ]
    return " · ".join([*parts, *(part for part in made if part)])


def _tiles(record: Record) -> list[Html]:
    numbers = record.summary
    epsilon = number(numbers.get("epsilon"))
    rank = decimal(record.rank, 1) + (f" of {record.dim}" if record.dim and record.rank is not None else "")
    few = percent(numbers.get("one_label_accuracy"), numbers.get("one_label_std"))
    shown = [
        (few, "accuracy, one label a class"),
        (percent(numbers.get("linear_accuracy")), "accuracy, linear probe"),
        (percent(numbers.get("knn_accuracy")), "accuracy, kNN"),
        (str(numbers["rounds"]), "rounds" if record.done else "rounds so far, not finished"),
        (decimal(numbers.get("loss"), 3), "training loss, last round"),
        (rank, "effective rank, dimensions"),
        (page.megabytes(numbers.get("bytes_up")), "sent up by clients"),
        (page.megabytes(numbers.get("bytes_down")), "sent down to clients"),
        (page.duration(numbers.get("seconds")), "time of the rounds"),
        ("no privacy claimed" if epsilon is None else f"ε = {epsilon:.2f}", "differential privacy"),
    ]
    return [page.tile(value, label) for value, label in shown if value != NOTHING]


def _probe_table(record: Record) -> list[Html]:
    """Probes by encoder: mean and spread over the draws of labels."""
    if not record.probes:
        why = "The data has no labels, or evaluate.final is off" if record.done else "Probes come after the last round"
        return [tag("p", text(f"{why}: there is nothing to compare."), cls="note")]
    rows = [["test accuracy, %", *record.probes]]
    for key, label in (*figures.PROBES, *retrieval.PROBES):
        cells = [percent(p.get(f"{key}_accuracy"), p.get(f"{key}_std")) for p in record.probes.values()]
        if any(cell != NOTHING for cell in cells):
            rows.append([label, *(cell.removesuffix(" %") for cell in cells)])
    note = "± is one standard deviation over draws of the labels."
    if "central" not in record.probes:
        note += " baselines=true adds the encoder of central training."
    return [page.table(rows), tag("p", text(note), cls="note")]


def _checks(checks: Sequence[Check]) -> list[Html]:
    if not checks:
        return [tag("p", text("Nothing measured yet: evaluate.every sets how often it is."), cls="note")]
    lines = (
        tag("li", tag("b", text(check.name)), tag("span", text(check.sentence)), cls="alarm" if check.alarm else "")
        for check in checks
    )
    return [tag("ul", *lines, cls="checks")]


def _figures(pictures: Sequence[tuple[bytes, str]]) -> list[Html]:
    return [tag("div", *(page.picture(*picture) for picture in pictures), cls="figures")] if pictures else []


def _split(record: Record) -> list[Html]:
    split = record.manifest.get("split", {})
    if not split:
        return []
    emd, skew = number(split.get("label_emd")), number(split.get("feature_skew"))
    absent = {name for name, value in (("label EMD", emd), ("feature skew", skew)) if value is None}
    rows = [
        ["statistic", "value", "reading"],
        ["label EMD", decimal(emd, 3), "0: same labels on every client; towards 1: each has its own"],
        ["feature skew", decimal(skew, 3), "0: examples look alike on every client; towards 1: each has its own look"],
        ["Gini of sizes", decimal(split.get("gini"), 3), "0: equal sizes; towards 1: one client has everything"],
        ["smallest client", decimal(split.get("smallest"), 0), "examples"],
        ["largest client", decimal(split.get("largest"), 0), "examples"],
        ["fingerprint", str(split.get("fingerprint", NOTHING))[:16], "equal fingerprints are equal splits"],
    ]
    return [page.table([row for row in rows if row[0] not in absent], words=[2])]


def _payload(record: Record) -> list[Html]:
    if not record.payload:
        return []
    notes = [tag("p", text(sentence), cls="note") for sentence in payload.sentences(record.payload)]
    return [page.table(payload.table(record.payload), words=[3, 4, 5]), *notes]


def table(runs: Sequence[RunDirectory]) -> list[list[str]]:
    """Runs side by side, as rows of text below their headings; the runs of a group of seeds are followed by their mean.

    Raises:
        ConfigError: there is no run.
        ResumeError: a run has no finished round, is damaged, or is no run.
    """
    return _table(_groups(runs))


def compare(runs: Sequence[RunDirectory], out: Path) -> Path:
    """Write one page for several runs: their results, where their configurations differ, their curves.

    Raises:
        ConfigError: there is no run, or the page cannot be written.
        ResumeError: a run has no finished round, is damaged, or is no run.
    """
    groups = _groups(runs)
    labels, rows = _labels(groups), _table(groups)
    means = [i for i, row in enumerate(rows) if row[0].startswith("mean of ")]
    best = max(groups, key=lambda group: _mean(group, "linear_accuracy") or -1.0)
    top = _mean(best, "linear_accuracy")
    title = f"{_count(sum(map(len, groups)), 'run')} of {_count(len(groups), 'configuration')}"
    told = (
        f"{title}: best linear probe {percent(top)}, {labels[groups.index(best)]}." if top is not None else f"{title}."
    )
    curves = {label: [r.rows for r in _finished(group)] for label, group in zip(labels, groups, strict=True)}
    note = "Test accuracies; ± is one standard deviation over finished runs that differ in nothing but their seed."
    document = page.page(
        f"{title} · fedssl",
        tag("header", tag("p", text("fedssl")), tag("h1", text(told))),
        page.section("Results", page.table(rows, words=[1, 2, 3], means=means), tag("p", text(note), cls="note")),
        page.section("Where they differ", *_differences(groups, labels)),
        page.section("By round", *_overlays(curves)),
    )
    write_text(out, document)
    return out


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _groups(runs: Sequence[RunDirectory]) -> list[list[Record]]:
    """Runs by configuration: those that differ only in their seed are together."""
    if not runs:
        raise ConfigError("there is no run to compare: pass the path of at least one")
    groups: dict[str, list[Record]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        record = _begun(run)
        job = {key: value for key, value in record.config.items() if key not in (*NOT_THE_JOB, "seed")}
        groups.setdefault(json.dumps(job, sort_keys=True, default=str), []).append(record)
    return list(groups.values())


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Names that tell the groups apart: what differs of method, strategy and partition, else a run's name."""
    kinds = [(g[0].kind("method"), g[0].kind("strategy"), g[0].partition) for g in groups]
    vary = [i for i in range(3) if len({kind[i] for kind in kinds}) > 1]
    chosen = [str(g[0].path) for g in groups]
    for labels in ([g[0].name for g in groups], [" · ".join(kind[i] for i in vary) for kind in kinds]):
        if all(labels) and len(set(labels)) == len(groups):
            chosen = labels  # the later, the better
    counts = [len(_finished(group)) for group in groups]
    return [f"{label} ({n} runs)" if n > 1 else label for label, n in zip(chosen, counts, strict=True)]


def _finished(group: Sequence[Record]) -> Sequence[Record]:
    """What a mean is taken over: the runs that have ended, or all while none has."""
    return [record for record in group if record.done] or group


def _values(record: Record) -> list[float | None]:
    """The numbers of a table's row, from the linear probe to the time."""
    shares = [number(record.summary.get(key)) for key in COLUMNS]
    size = sum(number(record.summary.get(key)) or 0.0 for key in ("bytes_up", "bytes_down"))
    percents = [None if share is None else 100 * share for share in shares]
    return [*percents, record.rank, size / 1e6, number(record.summary.get("seconds"))]


def _mean(group: Sequence[Record], key: str) -> float | None:
    found = [value for value in (number(r.summary.get(key)) for r in _finished(group)) if value is not None]
    return float(np.mean(found)) if found else None


def _table(groups: Sequence[Sequence[Record]]) -> list[list[str]]:
    rows = [list(HEADINGS)]
    for group in groups:
        for record in group:
            done, asked = record.summary["rounds"], record.of("federation", "rounds")
            epsilon = number(record.summary.get("epsilon"))
            rows.append(
                [
                    *(record.name, record.kind("method"), record.kind("strategy"), record.partition),
                    *(str(record.of("seed")), str(done) if record.done else f"{done} of {asked}"),
                    *(decimal(value, 1) for value in _values(record)),
                    "none claimed" if epsilon is None else f"{epsilon:.2f}",
                ]
            )
        ended = _finished(group)
        if len(ended) > 1:
            columns = zip(*(_values(record) for record in ended), strict=True)
            rows.append([f"mean of {len(ended)} runs", *rows[-1][1:4], "", "", *map(_spread, columns), rows[-1][-1]])
    return rows


def _spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if len(found) < 2:
        return decimal(found[0], 1) if found else NOTHING
    return f"{decimal(float(np.mean(found)), 1)} ± {np.std(found, ddof=1):.1f}"


def _differences(groups: Sequence[Sequence[Record]], labels: Sequence[str]) -> list[Html]:
    """The keys of the configuration in which the groups differ."""
    flat = [dict(flatten(group[0].config)) for group in groups]
    keys = sorted({key for one in flat for key in one} - {"name", "out", "seed"})
    rows = [[key, *(str(one.get(key, NOTHING)) for one in flat)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return [page.table([["key", *labels], *rows], words=range(1, len(groups) + 1))] if rows else []


def _overlays(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[Html]:
    caption = (
        "%s of the merged encoder by round: a line is the mean of a configuration, its band the range of its runs."
    )
    shown = []
    for key, name, label, scale in (
        ("knn_accuracy", "kNN accuracy", "kNN accuracy (%)", 100.0),
        ("rankme", "Effective rank", "effective rank (RankMe)", 1.0),
    ):
        if any(figures.points(rows, key)[0] for runs in curves.values() for rows in runs):
            shown.append((figures.image(figures.overlay(curves, key, label, scale), "svg"), caption % name))
    return _figures(shown)
