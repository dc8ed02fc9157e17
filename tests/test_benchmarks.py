"""The benchmarks work and compare like with like. Nothing here looks at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from benchmarks import (
    aggregation,
    alarms,
    broken,
    compression,
    engines,
    half,
    methods,
    pages,
    secure_sum,
    tables,
    workload,
)
from fedssl import config
from fedssl.job.setup import build_model
from fedssl.model import layout_of, to_arrays

TINY = workload.Work(clients=3, rounds=2, examples=16, batch_size=8, size=8, width=4)
LOCAL = [name for name in engines.EXACT if "ray" not in name]


def once(name: str, work: workload.Work) -> dict[str, Any]:
    """A measurement in this process, smaller than asked."""
    return workload.here(name, TINY)


def test_quick_comparison_of_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--quick", "--out", str(tmp_path)], once) == 0
    result = json.loads((tmp_path / "engines.json").read_text())
    assert [row["system"] for row in result["rows"]] == LOCAL
    assert [row["system"] for row in result["empty"]] == ["merge alone", f"{LOCAL[1]}, nothing merged", *LOCAL[1:]]
    assert re.fullmatch("[0-9a-f]{64}", result["sha256"])
    assert {run["sha256"] for run in result["runs"]} == {result["sha256"]}
    for run in result["runs"]:
        assert len(run["round_s"]) == len(run["round_cpu_s"]) == TINY.rounds
        assert run["peak_mib"] > 1
    for row in result["rows"]:
        assert row.keys() >= {key for _, key, _ in tables.COLUMNS}
        assert row["wall_ratio"].keys() == {"median", "min", "max"}
    assert result["machine"].keys() == {"date", "cpu", "cores", "memory_gib", "load_before", "versions"}
    assert result["command"] == "python -m benchmarks.engines --quick"

    page = (tmp_path / "engines.md").read_text()
    assert capsys.readouterr().out == page
    assert "Ray was not measured" in page
    for text in (page, (tmp_path / "engines.json").read_text()):
        assert str(tmp_path) not in text
        assert str(engines.ROOT) not in text


def test_systems_that_differ_are_refused() -> None:
    def wrong(name: str, work: workload.Work) -> dict[str, Any]:
        row = {"system": name, "startup_s": 0.0, "round_s": [1.0], "round_cpu_s": [1.0], "peak_mib": 1.0}
        return row | {"us_per_client": [1.0], "parameters": 1, "sha256": name}

    with pytest.raises(RuntimeError, match="do not compute the same thing"):
        engines.collect(TINY, 1, ray=False, once=wrong)


def test_the_table_of_methods_is_that_of_the_numbers_and_of_the_code(tmp_path: Path) -> None:
    """What docs/methods.md says equals the stored measurements, and what needs no training equals the code's answer."""
    page = tmp_path / "methods.md"
    page.write_text(methods.PAGE.read_text())
    result = json.loads(methods.RESULTS.read_text())
    methods.write_table(result, page)
    assert page.read_text() == methods.PAGE.read_text(), "run `python -m benchmarks.methods --table`"
    assert [row["method"] for row in result["rows"]] == methods.methods(), "a method was not measured"
    for row in result["rows"]:
        now = methods.described(row["method"])
        assert {key: row[key] for key in ("parts", "coupling")} == {key: now[key] for key in ("parts", "coupling")}
        assert row["kib_an_example"] == pytest.approx(now["kib_an_example"], rel=0.02)


def test_methods_are_measured_in_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SETTINGS", {"iid": ("partition=iid", "baselines=true"), "skewed": ()})
    page, out = tmp_path / "page.md", tmp_path / "methods.json"
    page.write_text(f"before\n{pages.begin(methods.COMMAND)}old\n{pages.END}\nafter\n")
    options = ["--methods", "mae", "--seeds", "0", "--rounds", "1", "--out", str(out), "--page", str(page)]
    assert methods.main([*options, "--runs", str(tmp_path / "runs")]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| `mae` | encoder, decoder | none |" in text
    assert "random encoder" in text
    assert "old" not in text
    assert {run["setting"] for run in json.loads(out.read_text())["rows"][0]["runs"]} == {
        "iid",
        "skewed",
        "random",
        "central",
    }


def test_the_table_of_compressions_is_that_of_the_numbers(tmp_path: Path) -> None:
    page = tmp_path / "communication.md"
    page.write_text(compression.PAGE.read_text())
    result = json.loads(compression.RESULTS.read_text())
    compression.write_table(result, page)
    assert page.read_text() == compression.PAGE.read_text(), "run `python -m benchmarks.compression --table`"
    assert {row["way"] for row in result["rows"]} == {*compression.WAYS, compression.RANDOM}
    job = methods.job_of("simclr")
    model = build_model(job, job.data.load().train.shape)
    merged, parameters = to_arrays(model), layout_of(model, job.method.parts).parameters
    for row in (row for row in result["rows"] if row["way"] in compression.WAYS):
        now = config.compose(compression.WAYS[row["way"]]).job.compression
        assert 0.95 * now.up_bytes(merged, parameters) < row["update_bytes"] <= now.up_bytes(merged, parameters) or (
            now.keep < 0.1
        ), row["way"]
        assert row["instruction_bytes"] == now.down_bytes(merged, parameters)


def test_half_of_the_bytes_is_held_against_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, out = tmp_path / "page.md", tmp_path / "half.json"
    page.write_text(half.PAGE.read_text())
    half.write_table(json.loads(half.RESULTS.read_text()), page)
    assert page.read_text() == half.PAGE.read_text(), "run `python -m benchmarks.half --table`"

    def measured(way: str, seed: int, options: list[str], folder: Path) -> dict[str, Any]:
        assert options == ["federation.rounds=3", "engine.workers=1"]
        worse = {"none": 0.0, "float16": 0.01 * seed}.get(way, 0.0)
        return {"way": way, "seed": seed, **dict.fromkeys(half.PROBES, 0.9 + 0.001 * seed - worse)}

    monkeypatch.setattr(half, "measured", measured)
    words = ["--seeds", "1", "2", "3", "--rounds", "3", "--out", str(out), "--page", str(page), "engine.workers=1"]
    assert half.main(words) == 0
    text = page.read_text()
    assert "| none | 90.2 | 90.2 | 90.2 |" in text
    # Of -1, -2 and -3 the mean is -2, the deviation 1, and Student's t with two degrees 4.303.
    assert f"| float16 | {' | '.join(['-2.00 (-4.48 to +0.48)'] * 3)} |" in text
    assert "| int8 | +0.00 (+0.00 to +0.00) |" in text
    assert "`python -m benchmarks.half --seeds 1 2 3 --rounds 3 engine.workers=1`" in text


def test_every_compression_is_measured(tmp_path: Path) -> None:
    page, out = tmp_path / "page.md", tmp_path / "compression.json"
    page.write_text(f"before\n{pages.begin(compression.COMMAND)}old\n{pages.END}\nafter\n")
    options = [
        "--seeds",
        "0",
        "--rounds",
        "1",
        "--out",
        str(out),
        "--page",
        str(page),
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert compression.main([*options, "evaluate.repeats=1", "encoder.width=4", "federation.clients=3"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| topk_int8 (1 %) |" in text
    assert "old" not in text
    assert str(tmp_path) not in text + out.read_text()
    sizes = {row["way"]: row.get("update_bytes", 0) for row in json.loads(out.read_text())["rows"]}
    assert sizes["none"] > 1.9 * sizes["float16"] > 3 * sizes["int8"] > 4 * sizes["topk (10 %)"]


def test_the_tables_of_alarms_are_those_of_the_numbers(tmp_path: Path) -> None:
    page = tmp_path / "collapse.md"
    page.write_text(alarms.PAGE.read_text())
    result = json.loads(alarms.RESULTS.read_text())
    alarms.write_tables(result, page)
    assert page.read_text() == alarms.PAGE.read_text(), "run `python -m benchmarks.alarms --table`"
    cases = [case.name for case in (*broken.provoked(), *broken.healthy())]
    assert len(set(cases)) == len(cases)
    assert [(row["case"], row["seed"]) for row in result["rows"]] == [(c, s) for s in result["seeds"] for c in cases]


def test_hits_and_false_alarms_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tuple(tiny("federation.rounds=1"))
    failures = [
        broken.Case("shrinks", ("weights do not add up to 1",), options, broken.scaled(0.5)),
        broken.Case("is well", ("teacher is the student",), options),
    ]
    monkeypatch.setattr(alarms, "provoked", lambda: failures)
    monkeypatch.setattr(alarms, "healthy", lambda: [broken.Case("shrinks unseen", (), options, broken.scaled(0.5))])
    page, out = tmp_path / "page.md", tmp_path / "alarms.json"
    page.write_text(f"before\n{pages.begin(alarms.COMMAND)}stale\n{pages.END}\nafter\n")
    assert alarms.main(["--seeds", "0", "1", "--out", str(out), "--page", str(page)]) == 0
    text = page.read_text()
    assert (text.startswith("before\n"), text.endswith("after\n"), "stale" in text) == (True, True, False)
    assert "| shrinks | weights do not add up to 1 | 1 of 1 | 1 of 1 | 1 |" in text
    assert "| is well | teacher is the student | 0 of 1 | 0 of 1 | never |" in text
    assert "Hits: 1 of 2 with seed 0" in text
    assert "1 of 1 and 1 of 1 raised an alarm; 0 of 1 settings never did." in text
    assert "| shrinks unseen | 1 of 1 | 1 of 1 |" in text
    assert "weights do not add up to 1 (2)" in text


def test_secure_sums_on_a_ring_and_on_the_complete_graph(tmp_path: Path) -> None:
    assert secure_sum.main(["--clients", "10", "50", "--numbers", "20", "--out", str(tmp_path / "sums.json")]) == 0
    rows = json.loads((tmp_path / "sums.json").read_text())["rows"]
    assert [(row["clients"], row["neighbours"]) for row in rows] == [(10, 9), (10, 9), (50, 30), (50, 49)]


def test_means_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "SIZES", ((6, 5000, 3),))
    out = tmp_path / "means.json"
    assert aggregation.main(["--turns", "1", "--share", "0.5", "--out", str(out)]) == 0
    rows = {row["system"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"exact", "float64", "float32"}
    assert all(row["clients"] == 3 and row["ms_per_client"] > 0 for row in rows.values())
    assert rows["exact"]["error"] == 0
