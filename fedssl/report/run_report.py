"""The report of a run: a web page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedssl.files import number, write_text
from fedssl.job import payload
from fedssl.measures import retrieval
from fedssl.measures.alarms import Alarm
from fedssl.report import page, run_figures
from fedssl.report.checks import Check, collapse_checks
from fedssl.report.page import NOTHING, Html, decimal, percent, tag, text
from fedssl.report.record import Record, begun
from fedssl.rundir import RunDirectory

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


def finish_report(run: RunDirectory) -> Path:
    """Draw a run's figures and write its `report.html`.

    Raises:
        ResumeError: the run has no finished round, is damaged, or is no run.
    """
    record = begun(run)
    pictures = [(p.read_bytes(), CAPTIONS[p.stem]) for p in run_figures.write(record) if p.suffix == ".svg"]
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
        page.section("Figures", *page.gallery(pictures)),
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
    for key, label in (*run_figures.PROBES, *retrieval.PROBES):
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
