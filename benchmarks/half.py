"""Whether half of the bytes cost anything on the digits: each way beside none, seed by seed, with intervals.

`python -m benchmarks.half` measures, keeps the numbers in benchmarks/results/half.json and writes the table into
docs/communication.md. `--table` writes the table again from the numbers that are there. Runs that have finished are
read, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compression import PAGE, ROOT, measured
from benchmarks.machine import machine
from benchmarks.pages import put
from fedssl.files import write_json
from fedssl.intervals import difference

RESULTS = ROOT / "benchmarks" / "results" / "half.json"
COMMAND = "python -m benchmarks.half"  # marks its place in the page
PLAIN, WAYS = "none", ("float16", "float16 both ways", "int8")
PROBES = {"linear_accuracy": "linear probe", "knn_accuracy": "kNN", "one_label_accuracy": "one label a class"}


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = result["rows"]
    lines = [
        f"| compression | {' | '.join(PROBES.values())} |",
        f"| --- |{' --- |' * len(PROBES)}",
        f"| {PLAIN} | {' | '.join(_mean(_of(rows, PLAIN, key)) for key in PROBES)} |",
        *(f"| {way} | {' | '.join(_beside(rows, way, key) for key in PROBES)} |" for way in WAYS),
    ]
    about, seeds = result["machine"], sorted({row["seed"] for row in rows})
    return "\n".join(
        [
            *lines,
            "",
            f"SimCLR on the digits, ten clients, Dirichlet split, {result['rounds']} rounds, default options, seeds",
            f"{', '.join(map(str, seeds))}. `{PLAIN}`: accuracy in %, mean over the seeds; the others: points above it",
            "in the run of the same seed, mean and 95 % interval (Student's t). A test example is 0.19 points.",
            f"{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, torch {about['versions']['torch']}:",
            f"`{result['command']}`.",
            "",
        ]
    )


def _of(rows: Sequence[Mapping[str, Any]], way: str, key: str) -> dict[int, float]:
    """A probe of one way by seed, in points."""
    return {row["seed"]: 100 * row[key] for row in rows if row["way"] == way}


def _mean(by_seed: Mapping[int, float]) -> str:
    return f"{statistics.mean(by_seed.values()):.1f}"


def _beside(rows: Sequence[Mapping[str, Any]], way: str, key: str) -> str:
    plain, own = _of(rows, PLAIN, key), _of(rows, way, key)
    gain = difference([own[seed] for seed in own], [plain[seed] for seed in own])
    return f"{gain.mean:+.2f} ({gain.mean - gain.half:+.2f} to {gain.mean + gain.half:+.2f})"


def write_table(result: Mapping[str, Any], page: Path) -> None:
    """Put the table between its marks in a page."""
    put(page, COMMAND, table(result))


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.half", description="Measure half of the bytes.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3], help="two or more")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=None, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table", action="store_true", help="write the table from the numbers that are there")
    chosen, options = parser.parse_known_args(arguments)
    if not chosen.table:
        about, given = machine(), [f"federation.rounds={chosen.rounds}", *options]
        with tempfile.TemporaryDirectory() as folder:
            runs = chosen.runs or Path(folder)
            rows = [measured(way, seed, given, runs) for seed in chosen.seeds for way in (PLAIN, *WAYS)]
        words = ["python -m benchmarks.half --seeds", *map(str, chosen.seeds), f"--rounds {chosen.rounds}", *options]
        result = {"command": " ".join(words), "machine": about, "rounds": chosen.rounds, "rows": rows}
        write_json(chosen.out, result)
    write_table(json.loads(chosen.out.read_text()), chosen.page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
