"""Do the alarms ring when they should, and only then? Federations broken on purpose, and healthy ones, on the digits.

`python -m benchmarks.alarms` runs them, keeps what was raised in benchmarks/results/alarms.json and writes the tables
into docs/collapse.md. `--table` writes the tables again from the numbers that are there. With `--runs` the runs are
kept: those that have finished are read and judged again, so an interrupted benchmark goes on, and a threshold can be
changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.broken import Case, healthy, provoked
from benchmarks.machine import machine
from benchmarks.pages import put
from fedssl import config
from fedssl.files import write_json
from fedssl.job import payload
from fedssl.measures.alarms import judge
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "alarms.json"
PAGE = ROOT / "docs" / "collapse.md"
COMMAND = "python -m benchmarks.alarms"  # marks its place in the page
Row = Mapping[str, Any]


def run(case: Case, seed: int, folder: Path) -> RunDirectory:
    """The finished run of a case, measured in every round."""
    name = "".join(c if c.isalnum() else "-" for c in f"{case.name}-{seed}")
    own = ("evaluate.every=1", "evaluate.final=false", f"seed={seed}", f"out={folder}", f"name={name}")
    payload.uploads.cache_clear()  # it goes by the job, which does not say what is broken
    with case.broken():
        plan = config.compose([*case.options, *own])
        rundir = plan.open()
        if not rundir.done:
            plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
    return rundir


def measured(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    """What a case raised, and what measuring cost."""
    rundir = run(case, seed, folder)
    rows = rundir.rows()
    alarms = judge(rundir.rows("collapse.jsonl"), rundir.config()["method"])
    found = [{"name": a.name, "part": a.part, "round": a.round, "last": a.last} for a in alarms]
    print(f"{case.name}, seed {seed}: {', '.join(a.name for a in alarms) or 'nothing'}", file=sys.stderr, flush=True)
    return {
        "case": case.name,
        "expects": list(case.expects),
        "seed": seed,
        "rounds": len(rows),
        "alarms": found,
        "measure_seconds": statistics.median(row["measure_seconds"] for row in rows),
        "train_seconds": statistics.median(row["train_seconds"] for row in rows),
    }


def tables(result: Mapping[str, Any]) -> str:
    """Hits and false alarms as Markdown."""
    rows, about, (first, *others) = result["rows"], result["machine"], result["seeds"]
    held = f"seeds {', '.join(map(str, others))}"
    broken, sound = ([row for row in rows if bool(row["expects"]) is side] for side in (True, False))
    cases = [
        [
            name,
            " or ".join(own[0]["expects"]),
            *(_hits(part) for part in _parted(own, first)),
            _when(own),
            ", ".join(_names(own, own[0]["expects"])) or "–",  # noqa: RUF001  a dash
        ]
        for name, own in _by_case(broken).items()
    ]
    false = [
        [name, *(_false(part) for part in _parted(own, first)), ", ".join(_names(own, ()))]
        for name, own in _by_case(sound).items()
        if any(row["alarms"] for row in own)
    ]
    hits, alarmed = ([count(part) for part in _parted(of, first)] for of, count in ((broken, _hits), (sound, _false)))
    quiet = sum(not any(row["alarms"] for row in own) for own in _by_case(sound).values())
    ratio = statistics.median(row["measure_seconds"] / row["train_seconds"] for row in sound)
    return "\n".join(
        [
            _markdown(
                [["broken on purpose", "expected", f"seed {first}", held, "first in round", "also raised"], *cases]
            ),
            "",
            f"Hits: {hits[0]} with seed {first}, on which the thresholds were set, {hits[1]} with {held}. Healthy "
            f"federations: {alarmed[0]} and {alarmed[1]} raised an alarm; {quiet} of {len(_by_case(sound))} settings "
            "never did. The others:",
            "",
            _markdown([["healthy", f"seed {first}", held, "raised"], *false]),
            "",
            f"Measured in every round, measuring takes {ratio:.1f} times as long as training here (median of the "
            f"healthy runs; ten clients of 126 examples, one local epoch). {about['date'][:10]}, {about['cpu']}, "
            f"{about['cores']} cores, torch {about['versions']['torch']}: `{result['command']}`.",
            "",
        ]
    )


def _parted(rows: Sequence[Row], first: int) -> tuple[list[Row], list[Row]]:
    """Those of the seed on which the thresholds were set, and the others."""
    return [row for row in rows if row["seed"] == first], [row for row in rows if row["seed"] != first]


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def _hit(row: Row) -> bool:
    return any(alarm["name"] in row["expects"] for alarm in row["alarms"])


def _hits(rows: Sequence[Row]) -> str:
    return f"{sum(map(_hit, rows))} of {len(rows)}"


def _false(rows: Sequence[Row]) -> str:
    return f"{sum(bool(row['alarms']) for row in rows)} of {len(rows)}"


def _when(rows: Sequence[Row]) -> str:
    """The rounds in which the expected alarm was first raised, from the earliest seed to the latest."""
    firsts = [min(a["round"] for a in row["alarms"] if a["name"] in row["expects"]) for row in rows if _hit(row)]
    if not firsts:
        return "never"
    return str(min(firsts)) if min(firsts) == max(firsts) else f"{min(firsts)} to {max(firsts)}"


def _names(rows: Sequence[Row], known: Sequence[str]) -> list[str]:
    """Other alarms than the known, and in how many runs."""
    counts: dict[str, int] = {}
    for row in rows:
        for name in {alarm["name"] for alarm in row["alarms"]} - set(known):
            counts[name] = counts.get(name, 0) + 1
    return [f"{name} ({count})" for name, count in sorted(counts.items())]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def write_tables(result: Mapping[str, Any], page: Path) -> None:
    """Put the tables between their marks in a page."""
    put(page, COMMAND, tables(result))


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alarms", description="Provoke every alarm.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="thresholds were set on the first")
    parser.add_argument("--runs", type=Path, default=None, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table", action="store_true", help="write the tables from the numbers that are there")
    chosen = parser.parse_args(arguments)
    if not chosen.table:
        torch.set_num_threads(1)
        start, about = time.monotonic(), machine()
        cases = [case for case in (*provoked(), *healthy()) if chosen.only in case.name]
        with tempfile.TemporaryDirectory() as folder:
            place = chosen.runs or Path(folder)
            rows = [measured(case, seed, place) for seed in chosen.seeds for case in cases]
        seeds = " ".join(map(str, chosen.seeds))
        command = f"python -m benchmarks.alarms --seeds {seeds}"
        result = {"command": command, "machine": about, "seconds": round(time.monotonic() - start)}
        write_json(chosen.out, result | {"seeds": chosen.seeds, "rows": rows})
    write_tables(json.loads(chosen.out.read_text()), chosen.page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
