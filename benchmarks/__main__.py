"""All measurements of speed and scale: `python -m benchmarks`.

Each measurement is a fresh process and a row of `benchmarks/results/speed.json`, which is not measured again unless
asked, so a run that was stopped goes on where it was. Systems take turns, and a ratio compares neighbours of one turn.
At the end the tables, the figure and the cost model in the documents are written from the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import cost, speed
from benchmarks.machine import machine
from benchmarks.speed import RESULTS
from benchmarks.workload import PFL, RAY, ROOT, SYSTEMS, Work, fresh
from fedssl.files import write_json, write_text

SMALL = Work(clients=100, rounds=2, examples=16, width=8)
COMPARED = {  # name: workload of all systems
    "small, batch 4, 16x16": replace(SMALL, batch_size=4, size=16),
    "reference": Work(clients=16, rounds=2),
    "resnet18": Work(clients=4, rounds=2, examples=32, batch_size=16, width=16, encoder="resnet18"),
    "small, batch 8, 32x32": replace(SMALL, batch_size=8, size=32),
    "small, batch 8, 16x16": replace(SMALL, batch_size=8, size=16),
    "small, batch 4, 32x32": replace(SMALL, batch_size=4, size=32),
}
TINY = Work(rounds=2, examples=4, batch_size=4, size=8, width=4)
ALONE, AUTO = "in_process, 1 worker", "in_process, cohort=auto"
STEPS = ((8, 4, 16), (8, 32, 16), (8, 8, 32), (16, 8, 32), (16, 64, 32), (32, 32, 32), (64, 16, 32), (16, 256, 32))


def cells(turns: int, left_out: Collection[str] = ()) -> Iterator[tuple[str, str, int, Work]]:
    """(group, name, turn, workload) of every measurement of the systems that are there, in order."""
    for width, batch, size in STEPS:
        work = Work(clients=1, examples=batch, batch_size=batch, size=size, width=width)
        yield f"step, width {width}, batch {batch}, {size}x{size}", "step: ", 0, work
    first, *more = COMPARED
    systems = [system for system in SYSTEMS if system not in left_out]
    yield from _compared([first], systems, 0)
    yield from _grown()
    for group in (first, *more):
        yield group, "difference: in_process, cohort=16", 0, COMPARED[group]
    yield from _compared(more, systems, 0)
    for turn in range(1, turns):
        yield from _compared([first, *more], systems, turn)


def _grown() -> Iterator[tuple[str, str, int, Work]]:
    for clients in (10, 100, 1000):
        for system in (ALONE, AUTO):
            yield f"{clients} clients", system, 0, replace(TINY, clients=clients)
    for width in (4, 16, 64, 128):
        yield f"width {width}", ALONE, 0, replace(TINY, clients=10, width=width)
    for pool in (100, 1000, 10000):
        yield f"pool of {pool}", ALONE, 0, replace(TINY, clients=pool, sampled=10)


def _compared(groups: Sequence[str], systems: Sequence[str], turn: int) -> Iterator[tuple[str, str, int, Work]]:
    for group in groups:
        for system in systems:
            yield group, system, turn, COMPARED[group]


Once = Callable[[str, Work], dict[str, Any]]


def collect(todo: Sequence[tuple[str, str, int, Work]], out: Path, again: bool, once: Once, device: str) -> None:
    """Measure what has no row yet, and keep each row at once."""
    command = "python -m benchmarks" if device == "cpu" else f"python -m benchmarks --device {device}"
    result = json.loads(out.read_text()) if out.exists() else {"command": command, "rows": []}
    result["machine"] = machine(device)
    there = {(row["group"], row["name"], row["turn"]) for row in result["rows"]}
    for number, (group, name, turn, work) in enumerate(todo, 1):
        if (group, name, turn) in there and not again:
            continue
        print(f"{number}/{len(todo)} {time.strftime('%H:%M:%S')} {group}: {name}", file=sys.stderr, flush=True)
        about = {"group": group, "name": name, "turn": turn, "load": round(os.getloadavg()[0], 2)}
        row = {**about, "work": asdict(work), **once(name, work)}
        kept = [r for r in result["rows"] if (r["group"], r["name"], r["turn"]) != (group, name, turn)]
        result["rows"] = [*kept, row]
        write_json(out, result)


def main(arguments: Sequence[str] | None = None, once: Once | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed and scale.")
    parser.add_argument("--turns", type=int, default=3, help="of all systems on all compared workloads")
    parser.add_argument("--only", default="", help="measure groups and systems whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--tables", action="store_true", help="only write documents from the rows that are there")
    parser.add_argument("--no-ray", dest="ray", action="store_false", help="leave Ray out")
    parser.add_argument("--pfl", type=Path, help="a folder with pfl-research, which is left out otherwise")
    parser.add_argument("--device", default="cpu", help="cuda: systems alone, rows and page beside those of the CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    chosen = parser.parse_args(arguments)
    here = chosen.device == "cpu"
    out = chosen.out or (RESULTS if here else RESULTS.with_stem(f"{RESULTS.stem}_{chosen.device}"))
    there = {RAY: chosen.ray and find_spec("ray") is not None, PFL: here and chosen.pfl is not None}
    there |= {system: here for system, options in SYSTEMS.items() if "engine=processes" in options}
    left_out = [system for system, found in there.items() if not found]
    todo = [cell for cell in cells(chosen.turns, left_out) if chosen.only in f"{cell[0]}: {cell[1]}"]
    if not here:
        moved = [(*cell, replace(work, device=chosen.device)) for *cell, work in todo]
        todo = [(group, name, turn, work) for group, name, turn, work in moved if group in COMPARED and name in SYSTEMS]

    def measured(name: str, work: Work) -> dict[str, Any]:
        return fresh(name, work, chosen.pfl.resolve() if name == PFL else None)

    if not chosen.tables:
        collect(todo, out, chosen.again, once or measured, chosen.device)
    result = json.loads(out.read_text())
    if here:
        speed.write(result, chosen.docs, out.parent)
        cost.write(result, chosen.docs)
    else:  # the documents' tables are the CPU's
        write_text(out.with_suffix(".md"), speed.full(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
