"""What the mean of a round costs: `python -m benchmarks.aggregation`.

Streaming sums of float32 updates that are freed one by one, on one thread: the exact sum, which does not depend on the
order of arrival, plain float64, and plain float32 as a floor. The systems take turns in one process (A B C A B C ...),
each turn a round of its own whose memory is traced; processor time, because other processes may run beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from fedssl.files import write_json
from fedssl.parts import Arrays
from fedssl.tree import PartialMean

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "aggregation.json"
SIZES = (
    (1000, 1_000_000, 20),
    (100, 11_000_000, 62),
    (1000, 77_000, 20),
)  # clients, parameters, arrays: ResNet-18 is second
_WEIGHTS = (96.0, 31.0, 250.0)  # examples, in turn
Result = tuple[Arrays, float]  # the mean, and processor seconds of all additions


def _update(parameters: int, arrays: int) -> Arrays:
    rng = np.random.default_rng(0)
    sizes = np.diff(np.linspace(0, parameters, arrays + 1).astype(int))
    return {f"part.{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)}


def _ours(update: Arrays, clients: int, exact: bool) -> Result:
    mean = PartialMean(update, exact)
    began = time.process_time()
    for client in range(clients):
        mean.add(update, _WEIGHTS[client % len(_WEIGHTS)])
    took = time.process_time() - began
    return mean.result(), took


def _float32(update: Arrays, clients: int) -> Result:
    sums = {key: np.zeros_like(value) for key, value in update.items()}
    scratch = {key: np.empty_like(value) for key, value in update.items()}
    total, began = 0.0, time.process_time()
    for client in range(clients):
        weight = _WEIGHTS[client % len(_WEIGHTS)]
        for key, value in update.items():
            sums[key] += np.multiply(value, np.float32(weight), out=scratch[key])
        total += weight
    took = time.process_time() - began
    return {key: value / np.float32(total) for key, value in sums.items()}, took


SYSTEMS: dict[str, Callable[[Arrays, int], Result]] = {
    "exact": lambda update, clients: _ours(update, clients, exact=True),
    "float64": lambda update, clients: _ours(update, clients, exact=False),
    "float32": _float32,
}


def measure(system: str, update: Arrays, clients: int) -> dict[str, float]:
    """One round: milliseconds a client, memory beside the update, and how wrong the mean is of equal updates."""
    tracemalloc.start()
    mean, took = SYSTEMS[system](update, clients)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    error = max(float(np.abs(mean[key] - value).max()) for key, value in update.items())
    return {"ms_per_client": 1e3 * took / clients, "peak_mib": peak / 2**20, "error": error}


def rows(clients: int, parameters: int, arrays: int, turns: int) -> list[dict[str, Any]]:
    """The systems in turn on one size; medians over the turns."""
    update = _update(parameters, arrays)
    found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for _ in range(turns):
        for system in SYSTEMS:
            found[system].append(measure(system, update, clients))
    size = {"clients": clients, "parameters": parameters, "arrays": arrays}
    return [
        {**size, "system": system, **{key: statistics.median(one[key] for one in each) for key in each[0]}}
        for system, each in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the clients")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    about = {"command": "python -m benchmarks.aggregation", "machine": machine(), "turns": chosen.turns}
    table = []
    for clients, parameters, arrays in SIZES:
        for row in rows(max(1, round(clients * chosen.share)), parameters, arrays, chosen.turns):
            table.append(row)
            print(
                f"{row['clients']:5} x {parameters:10,} in {arrays} arrays, {row['system']:8}: "
                f"{row['ms_per_client']:7.2f} ms a client, {row['peak_mib']:6.1f} MiB, error {row['error']:.1e}"
            )
    write_json(chosen.out, {**about, "share": chosen.share, "rows": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
