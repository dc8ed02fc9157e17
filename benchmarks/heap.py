"""What it is worth that a run keeps the memory that it frees: `python -m benchmarks.heap`.

The same run in fresh processes that take turns, one of which leaves glibc as it is: processor seconds of a round, the
first left out, as median and quartiles of neighbours' ratios, and memory at its peak.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.pages import put
from benchmarks.speed import later, table
from benchmarks.workload import ROOT, Work, fresh, measure
from fedssl.files import write_json
from fedssl.flower import engines

COMMAND = "python -m benchmarks.heap"
RESULTS = ROOT / "benchmarks" / "results" / "heap.json"
PAGE = ROOT / "docs" / "engines.md"
GIVEN_BACK = "given back"
ONE, SIXTEEN = "in_process, 1 worker", "in_process, cohort=16"
WORKS = {
    "16 clients at once, conv4, width 8, 32x32, batch 8": (SIXTEEN, Work(32, 3, 16, 8, width=8)),
    "conv4, width 16, 32x32, batch 32": (ONE, Work(4, 3)),
    "conv4, width 16, 32x32, batch 256": (ONE, Work(2, 3, 512, 256)),
    "resnet18, width 16, 32x32, batch 16": (ONE, Work(4, 3, 32, 16, encoder="resnet18")),
}
Once = Callable[[str, Work], dict[str, Any]]


def main(arguments: Sequence[str] | None = None, once: Once = fresh) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args(arguments)
    rows = []
    for name, (system, work) in WORKS.items():
        for turn in range(chosen.turns):
            kept, given = once(system, work), once(f"{GIVEN_BACK}: {system}", work)
            cpu = {"kept": later(kept, "round_cpu_s"), "given": later(given, "round_cpu_s")}
            mib = {"kept_mib": kept["peak_mib"], "given_mib": given["peak_mib"]}
            rows.append({"work": name, "turn": turn, **cpu, **mib})
    result = {"command": COMMAND, "machine": machine(), "turns": chosen.turns, "rows": rows}
    write_json(chosen.out, result)
    put(chosen.page, COMMAND, told(result))
    print(told(result))
    return 0


def told(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows, about, body = result["rows"], result["machine"], []
    for work in dict.fromkeys(row["work"] for row in rows):
        own = [row for row in rows if row["work"] == work]
        low, ratio, high = statistics.quantiles([row["kept"] / row["given"] for row in own], n=4)
        memory = [f"{statistics.median(row[key] for row in own):.0f} MiB" for key in ("kept_mib", "given_mib")]
        body.append([work, f"{ratio:.2f} ({low:.2f} to {high:.2f})", *memory])
    head = ["in process", "CPU time, kept / given back", "peak, kept", "peak, given back"]
    return (
        f"{table(head, body)}\nMedians and quartiles of {result['turns']} turns.\n{about['date'][:10]}, {about['cpu']},"
        f" one torch thread, torch {about['versions']['torch']}, load before the start {about['load_before']}: "
        f"`{result['command']}`.\n"
    )


def given_back(system: str, work: Work) -> dict[str, Any]:
    """One measurement of a process that leaves glibc as it is."""
    engines.keep_freed = lambda: False
    return measure(system, work)


if __name__ == "__main__":
    raise SystemExit(main())
