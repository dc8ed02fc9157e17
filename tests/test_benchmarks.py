"""The benchmarks work and compare like with like. Nothing here looks at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines, tables

TINY = engines.Work(clients=3, rounds=2, examples=16, batch_size=8, size=8, width=4)
LOCAL = [name for name in engines.SYSTEMS if "ray" not in name]


def once(name: str, work: engines.Work) -> dict[str, Any]:
    """A measurement in this process, smaller than asked."""
    return engines.here(name, TINY)


def test_quick_comparison_of_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--quick", "--out", str(tmp_path)], once) == 0
    result = json.loads((tmp_path / "engines.json").read_text())
    assert [row["system"] for row in result["rows"]] == LOCAL
    assert [row["system"] for row in result["empty"]] == ["merge alone", *LOCAL[1:]]
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
    def wrong(name: str, work: engines.Work) -> dict[str, Any]:
        row = {"system": name, "startup_s": 0.0, "round_s": [1.0], "round_cpu_s": [1.0], "peak_mib": 1.0}
        return row | {"us_per_client": [1.0], "parameters": 1, "sha256": name}

    with pytest.raises(RuntimeError, match="do not compute the same thing"):
        engines.collect(TINY, 1, ray=False, once=wrong)
