"""Tables that benchmarks have written into pages are those of the stored numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bandwidth, fast_steps, half, heap, workload
from benchmarks.pages import END, begin
from benchmarks.workload import Work
from fedssl.flower import engines

TABLES: tuple[tuple[str, Path, Path, Callable[[Mapping[str, Any]], str]], ...] = (
    (bandwidth.COMMAND, bandwidth.RESULTS, bandwidth.PAGE, bandwidth.told),
    (fast_steps.COMMAND, fast_steps.RESULTS, fast_steps.PAGE, fast_steps.told),
    (heap.COMMAND, heap.RESULTS, heap.PAGE, heap.told),
    (half.COMMAND, half.RESULTS, half.PAGE, half.table),
)


@pytest.mark.parametrize(("command", "results", "page", "told"), TABLES, ids=[table[0] for table in TABLES])
def test_the_page_tells_the_stored_numbers(
    command: str, results: Path, page: Path, told: Callable[[Mapping[str, Any]], str]
) -> None:
    written = page.read_text(encoding="utf-8").partition(begin(command))[2].partition(END)[0]
    assert written == told(json.loads(results.read_text()))


def test_memory_that_is_kept_is_held_against_memory_that_is_given_back(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{begin(heap.COMMAND)}{END}")

    def once(name: str, work: Work) -> dict[str, Any]:
        given = name.startswith(heap.GIVEN_BACK)
        return {"round_cpu_s": [9.0, 4.0 if given else 3.0], "peak_mib": 500.0 if given else 400.0}

    assert heap.main(["--turns", "2", "--out", str(tmp_path / "heap.json"), "--page", str(page)], once) == 0
    assert page.read_text().count("| 0.75 (0.75 to 0.75) | 400 MiB | 500 MiB |") == len(heap.WORKS)


def test_a_run_that_gives_memory_back_ends_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "keep_freed", engines.keep_freed)  # restored after the test
    tiny = Work(clients=3, rounds=2, examples=8, batch_size=4, size=8, width=4)
    kept, given = (workload.here(name, tiny) for name in (heap.ONE, f"{heap.GIVEN_BACK}: {heap.ONE}"))
    assert kept["sha256"] == given["sha256"]
    assert not engines.keep_freed()
