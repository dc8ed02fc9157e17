"""Each alarm, from rows on both sides of its limit and from tiny runs that are broken in one way; where it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from conftest import execute
from test_laws import interrupted

from benchmarks import broken
from fedssl.config import Plan
from fedssl.measures import alarms
from fedssl.measures.alarms import REMEDIES, judge
from fedssl.methods.byol import BYOL
from fedssl.progress import Reporter
from fedssl.report import collapse_figures, figures, finish_report
from fedssl.report.checks import collapse_checks
from fedssl.report.record import Record
from fedssl.rundir import RunDirectory

Compose = Callable[..., Plan]
Row = dict[str, Any]
Change = dict[tuple[Any, str], dict[str, Any]]  # (client, part) -> what is different

FEATURES = {
    **{"dim": 64, "examples": 500, "rankme": 20.0, "feature_std": 0.05, "uniformity": -1.0, "alignment": 0.2},
    **{"cka_clients": 0.6, "cka_global": 0.9, "moved": 0.05, "spectrum": [0.5, 0.2, 0.01]},
}
MERGED = {
    **{"cka_round": 0.9, "rankme_before": 20.0, "norm_ratio": 0.97, "merge_scale": 1.0, "scale_low": 0.99},
    **{"scale_high": 1.01, "uniformity_intra": -0.5, "uniformity_inter": -1.0},
}


def rows_of(*rounds: Change) -> list[Row]:
    """A healthy run of as many rounds, with these changes."""
    found = []
    for at, change in enumerate(rounds, 1):
        for who in ("merged", 0, 1, 2):
            for part in ("encoder", "projector", "predictor"):
                row = {
                    **FEATURES,
                    **(MERGED if who == "merged" else {}),
                    **({"identity": 0.9} if part == "predictor" else {}),
                }
                found.append({"round": at, "client": who, "part": part, **row, **change.get((who, part), {})})
            teacher = {"moved": 0.01, "gap": 0.05, "step": 0.01, **change.get((who, "teacher"), {})}
            found.append({"round": at, "client": who, "part": "teacher", **teacher})
    return found


def clients(part: str, **values: float) -> Change:
    return {(client, part): values for client in (0, 1, 2)}


def raised(*rounds: Change, method: dict[str, Any] | None = None) -> list[tuple[str, str, int, int]]:
    return [(a.name, a.part, a.round, a.last) for a in judge(rows_of(*rounds), method or {})]


def test_a_healthy_run_raises_nothing() -> None:
    assert raised({}, {}, {}) == []
    assert judge([], {}) == []


ENCODER = ("merged", "encoder")
CASES: list[tuple[str, str, Change, Change]] = [  # alarm, part, what raises it, what just does not
    ("divergence", "encoder", {ENCODER: {"rankme": None}}, {}),
    ("complete collapse", "encoder", {ENCODER: {"feature_std": 0.00999}}, {ENCODER: {"feature_std": 0.01001}}),
    (
        *("complete collapse", "projector"),
        {("merged", "projector"): {"uniformity": -0.0249}},
        {("merged", "projector"): {"uniformity": -0.0251}},
    ),
    ("dimensional collapse", "encoder", {ENCODER: {"rankme": 3.19}}, {}),
    (
        *("dimensional collapse", "encoder"),
        {ENCODER: {"rankme": 9.9, "rankme_before": 40.0}, **clients("encoder", rankme=10.0)},
        {ENCODER: {"rankme": 10.1, "rankme_before": 40.0}, **clients("encoder", rankme=10.0)},
    ),
    (
        "merge hurts",
        "projector",
        {("merged", "projector"): {"rankme": 9.9}},
        {("merged", "projector"): {"rankme": 10.1}},
    ),
    ("weights do not add up to 1", "encoder", {ENCODER: {"merge_scale": 0.979}}, {ENCODER: {"merge_scale": 0.981}}),
    ("weights do not add up to 1", "encoder", {ENCODER: {"merge_scale": 1.021}}, {ENCODER: {"merge_scale": 1.019}}),
    (
        *("teacher is the student", "teacher"),
        {("merged", "teacher"): {"gap": 0.0, "step": 1.0}},
        {("merged", "teacher"): {"gap": 1e-9}},
    ),
    (
        *("teacher moves too fast", "teacher"),
        {("merged", "teacher"): {"step": 0.51}},
        {("merged", "teacher"): {"step": 0.49}},
    ),
    (
        *("predictor idle", "predictor"),
        {("merged", "predictor"): {"moved": 0.00049}},
        {("merged", "predictor"): {"moved": 0.00051}},
    ),
    (
        *("predictor idle", "predictor"),
        {("merged", "predictor"): {"identity": 0.996}},
        {("merged", "predictor"): {"identity": 0.994}},
    ),
]


@pytest.mark.parametrize(("name", "part", "bad", "good"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_an_alarm_is_raised_on_one_side_of_its_limit(name: str, part: str, bad: Change, good: Change) -> None:
    assert (name, part, 2, 2) in raised({}, bad)
    assert raised({}, good) == []


def test_what_hurts_twice_in_a_row_is_told_from_what_hurts_once() -> None:
    merge = {ENCODER: {"rankme": 14.9}}  # of 20
    assert raised({}, merge, {}, merge) == []
    assert raised(merge, merge) == [("merge hurts", "encoder", 2, 2)]
    local = clients("encoder", rankme=15.9) | {ENCODER: {"rankme": 15.9}}
    assert raised({}, local, {}, local) == []
    assert raised(local, local, local) == [("skew hurts", "encoder", 2, 3)]


def test_skew_is_blamed_only_where_there_is_skew_and_clients_differ() -> None:
    local = clients("encoder", rankme=10.0)
    for changes in ({"uniformity_intra": -0.98}, {"cka_clients": 0.71}, {"rankme_before": 12.4}):
        alike = local | {ENCODER: changes}
        assert raised(alike, alike) == []


def test_a_network_that_is_waking_up_has_not_collapsed() -> None:
    """Untrained networks with batch norm give nearly constant outputs; a part whose rank grows is on its way."""
    narrow = {"feature_std": 0.001, "uniformity": -0.001, "rankme": 2.0}
    for before, expected in ((1.8, []), (2.0, [("complete collapse", "projector", 1, 1)])):
        row = {**narrow, "rankme_before": before}
        assert raised({("merged", "projector"): row} | clients("projector", rankme=2.0)) == expected


def test_a_teacher_that_nobody_has_trained_is_no_alarm() -> None:
    still = {
        ("merged", "teacher"): {"gap": 0.0, "step": 0.0},
        **{("merged", p): {"moved": 0.0} for p in ("encoder", "projector")},
    }
    assert raised(still) == []


def test_a_merged_model_with_parts_at_home_is_not_judged() -> None:
    row = {"partial": True, "rankme": 1.0, "feature_std": 0.0, "uniformity": 0.0}
    assert raised({ENCODER: row, ("merged", "projector"): row}) == []


def test_a_cause_that_the_options_tell_comes_first() -> None:
    collapsed = {ENCODER: {"feature_std": 0.0}}
    usual, _ = REMEDIES["complete collapse"]
    assert judge(rows_of(collapsed), {"stop_gradient": True})[0].cause == usual
    assert "stop_gradient=false" in judge(rows_of(collapsed), {"stop_gradient": False})[0].cause
    fast = {("merged", "teacher"): {"step": 0.99}}
    later = judge(rows_of(fast, collapsed), {})
    assert later[0].name == "teacher moves too fast"
    assert "the teacher moves too fast alarm came first" in later[1].cause


def test_the_end_of_a_run_is_judged_once() -> None:
    final = {"feature_std": 0.0, "uniformity": -1.0, "rankme": 20.0, "knn_accuracy": 0.5}
    at_end = alarms.at_end(rows_of({}), {}, final, 5, 64)
    assert [(a.name, a.part, a.round) for a in at_end] == [("complete collapse", "encoder", 5)]
    assert alarms.at_end(rows_of({}), {}, final, 1, 64) == [], "round 1 was measured"


# --- in runs

TEACHER = ("method=byol", "method.decay_schedule=constant")


@pytest.mark.parametrize(
    ("name", "bad", "change", "good"),
    [
        ("teacher is the student", (*TEACHER, "method.decay=0.0"), None, (*TEACHER,)),
        ("teacher moves too fast", (*TEACHER, "method.decay=0.004"), None, (*TEACHER, "method.decay=0.996")),
        ("weights do not add up to 1", (), broken.scaled(0.9), ()),
        ("predictor idle", ("method=byol",), broken.predictor(BYOL, broken.frozen), ("method=byol",)),
    ],
)
def test_a_broken_run_says_what_is_broken_and_its_twin_does_not(
    name: str, bad: tuple[str, ...], change: broken.Break | None, good: tuple[str, ...], plan: Compose
) -> None:
    options = ("evaluate.every=1", "local.lr=0.02", "local.warmup=0.0")
    with change() if change else nullcontext():
        ill = execute(plan(*options, *bad, name="ill"))
    assert name in [alarm["name"] for alarm in ill.read("summary.json")["alarms"]]
    well = execute(plan(*options, *good, name="well"))
    assert name not in [alarm["name"] for alarm in well.read("summary.json")["alarms"]]


class Heard(Reporter):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """One line."""
        self.lines.append(text)


def test_an_alarm_is_said_once_and_stays_in_summary_and_report(plan: Compose) -> None:
    chosen = plan("method=byol", "method.decay=0.004", "federation.rounds=3", "evaluate.every=1")
    run, heard = chosen.open(), Heard()
    chosen.build_engine().run(chosen.job, run, heard)
    said = [line for line in heard.lines if "teacher moves too fast" in line]
    assert len(said) == 1
    assert said[0].startswith("alarm in round 1: teacher moves too fast (teacher): in one step it covers ")
    assert "\n" not in said[0]
    (alarm,) = (a for a in run.read("summary.json")["alarms"] if a["name"] == "teacher moves too fast")
    assert alarm.keys() == {"name", "part", "round", "last", "found", "cause", "remedy"}
    assert (alarm["round"], alarm["part"]) == (1, "teacher")
    html = finish_report(run).read_text()
    assert "Teacher moves too fast, teacher" in html
    assert "Spectra over the rounds: " in html
    names = {path.stem for path in (run.path / "figures").iterdir()}
    assert {"ranks", "spectra", "agreement"} <= names


def test_a_resumed_run_does_not_say_it_again(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("method=byol", "method.decay=0.004", "federation.rounds=4", "evaluate.every=1")
    interrupted(plan(*options), 2, monkeypatch)
    chosen, heard = plan(*options), Heard()
    run = chosen.open()
    chosen.build_engine().run(chosen.job, run, heard)
    assert not any("teacher moves too fast" in line for line in heard.lines)
    assert [a["round"] for a in run.read("summary.json")["alarms"] if a["name"] == "teacher moves too fast"] == [1]


def test_an_alarm_that_has_passed_is_told_as_such(plan: Compose) -> None:
    run = execute(plan("evaluate.every=1", "federation.rounds=3"))
    bad = {("merged", "teacher"): {"step": 0.99}}

    def rewrite(*rounds: Change) -> Record:
        lines = [json.dumps(row) + "\n" for row in rows_of(*rounds)]
        (run.path / "collapse.jsonl").write_text("".join(lines))
        return Record.read(RunDirectory(run.path))

    passed, lasting = rewrite(bad, bad, {}), rewrite({}, bad, bad)
    assert [a.name for a in passed.alarms] == ["teacher moves too fast"] == [a.name for a in lasting.alarms]
    assert (passed.lasting, len(lasting.lasting)) == ([], 1)
    checks = {check.name: check for check in collapse_checks(passed)}
    told = checks["Teacher moves too fast, teacher"]
    assert (told.sentence.startswith("In rounds 1 to 2 and not since: "), told.alarm) == (True, "")


def test_figures_of_the_monitor_are_the_same_twice_and_take_any_run() -> None:
    alone = [row for row in rows_of({}) if row["client"] == "merged"]
    broken_off = rows_of({("merged", "encoder"): {"rankme": None, "spectrum": [None] * 3}})
    three = rows_of({}, {}, {})
    drawn = [
        {name: figures.image(figure, "svg") for name, figure in collapse_figures.drawings(rows)}
        for rows in (alone, broken_off, three, three)
    ]
    assert all(images.keys() == {"ranks", "spectra", "agreement"} for images in drawn)
    assert drawn[2] == drawn[3]
    assert dict(collapse_figures.drawings([])) == {}
