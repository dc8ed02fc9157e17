"""Tables that benchmarks have written into pages are those of the stored numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bandwidth, fast_steps, half
from benchmarks.pages import END, begin

TABLES: tuple[tuple[str, Path, Path, Callable[[Mapping[str, Any]], str]], ...] = (
    (bandwidth.COMMAND, bandwidth.RESULTS, bandwidth.PAGE, bandwidth.told),
    (fast_steps.COMMAND, fast_steps.RESULTS, fast_steps.PAGE, fast_steps.told),
    (half.COMMAND, half.RESULTS, half.PAGE, half.table),
)


@pytest.mark.parametrize(("command", "results", "page", "told"), TABLES, ids=[table[0] for table in TABLES])
def test_the_page_tells_the_stored_numbers(
    command: str, results: Path, page: Path, told: Callable[[Mapping[str, Any]], str]
) -> None:
    written = page.read_text(encoding="utf-8").partition(begin(command))[2].partition(END)[0]
    assert written == told(json.loads(results.read_text()))
