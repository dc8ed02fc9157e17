"""What the engines add to a bare training loop: `python -m benchmarks.engines`.

One workload for all systems: SimCLR of the four-convolution GroupNorm encoder on drawn 32x32x3 images, 96 examples a
client, batch 32, one local epoch, SGD with momentum, FedAvg. Every system trains the same clients with equal seeds and
must end with the same bits, which is checked. Nothing is evaluated inside the rounds and only the last round writes
a checkpoint, so that engines are compared and nothing else.

Each measurement is a fresh process with one torch thread a client; the systems take turns (A B C D A B C D ...), and a
ratio compares neighbours of the same turn. The first round is shown apart: in it each worker reads the data and builds
its model.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.empty import EMPTY
from benchmarks.machine import machine
from benchmarks.tables import tables
from benchmarks.workload import BARE, ROOT, Work, fresh
from fedssl.files import write_json, write_text

EXACT = (  # they end with the same bits
    *(BARE, "in_process, 1 worker", "in_process, 2 workers", "processes, 2 workers", "ray, 2 cpus"),
)
Once = Callable[[str, Work], dict[str, Any]]


def collect(work: Work, pairs: int, ray: bool, once: Once = fresh) -> dict[str, Any]:
    """All measurements: every system in turn, `pairs` times, then the empty clients likewise.

    Raises:
        RuntimeError: two runs ended with different bits.
    """
    names = [name for name in EXACT if ray or "ray" not in name]
    empty = [name for name in EMPTY if ray or "ray" not in name]
    about = machine()
    runs = [{"pair": pair, **once(name, work)} for pair in range(pairs) for name in names]
    idles = [{"pair": pair, **once(f"empty: {name}", work)} for pair in range(pairs) for name in empty]
    hashes = {run["sha256"] for run in runs}
    if len(hashes) != 1:
        each = ", ".join(f"{run['system']}: {run['sha256'][:12]}" for run in runs)
        raise RuntimeError(f"the systems do not compute the same thing ({each})")
    rows = [_row(name, runs) for name in names]
    middle = [{"system": n, "us_per_client": _spread(_of(idles, n, "us_per_client"))} for n in empty]
    return {
        "machine": about,
        "work": work.__dict__,
        "pairs": pairs,
        "parameters": runs[0]["parameters"],
        "sha256": hashes.pop(),
        "rows": rows,
        "empty": middle,
        "runs": runs,
        "empty_runs": idles,
    }


def _of(runs: Iterable[Mapping[str, Any]], system: str, key: str) -> list[float]:
    """One number a pair: a value, or the mean over the rounds but the first (clients' rounds are all alike)."""
    values = [run[key] for run in runs if run["system"] == system]
    cut = 1 if key.startswith("round") else 0
    return [statistics.fmean(v[cut:] or v) if isinstance(v, list) else v for v in values]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of a system, and its ratios to the bare loop pair by pair."""
    row: dict[str, Any] = {"system": name}
    row["first_round_s"] = statistics.median(run["round_s"][0] for run in runs if run["system"] == name)
    for key in ("startup_s", "round_s", "round_cpu_s", "peak_mib"):
        row[key] = statistics.median(_of(runs, name, key))
    for key, ratio in (("round_s", "wall_ratio"), ("round_cpu_s", "cpu_ratio")):
        pairs = zip(_of(runs, name, key), _of(runs, BARE, key), strict=True)
        row[ratio] = _spread([mine / floor for mine, floor in pairs if floor > 0] or [float("nan")])
    return row


def main(argv: Sequence[str] | None = None, once: Once = fresh) -> int:
    """Measure and write `engines.json` and `engines.md`; `--quick` writes nothing unless `--out` is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--quick", action="store_true", help="8 clients, 2 rounds, 1 pair, and Ray only with --ray")
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, help="measure Ray, if it is installed")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results")
    options = parser.parse_args(argv)
    usual = (8, 2, 1) if options.quick else (100, 4, 5)
    work = Work(options.clients or usual[0], options.rounds or usual[1])
    wanted = not options.quick if options.ray is None else options.ray
    result = collect(work, options.pairs or usual[2], wanted and find_spec("ray") is not None, once)
    given = [f"--{k}={v}" for k, v in vars(options).items() if type(v) is int]
    given += ["--quick"] * options.quick + ["--ray"] * bool(options.ray) + ["--no-ray"] * (options.ray is False)
    result["command"] = shlex.join(["python", "-m", "benchmarks.engines", *given])
    print(tables(result))
    folder = options.out or (None if options.quick else ROOT / "benchmarks" / "results")
    if folder is not None:
        write_json(folder / "engines.json", result)
        write_text(folder / "engines.md", tables(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
