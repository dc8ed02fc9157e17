"""What a secure sum costs: `python -m benchmarks.secure_sum`.

The protocol alone, all sides in this process on one thread: every client's four steps and the server's, with a tenth of
the clients gone after they have shared their secrets. The ring of neighbours against the complete graph, in turns.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from fedssl.files import write_json
from fedssl.privacy.clients.secure import Secure
from fedssl.privacy.secagg.graph import sizes
from fedssl.privacy.secagg.simulate import aggregate

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "secure_sum.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--numbers", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    rows = [measure(clients, chosen.numbers, graph) for clients in chosen.clients for graph in ("ring", "complete")]
    for row in rows:
        print(f"{row['clients']:5} clients, {row['neighbours']:4} neighbours ({row['graph']}): {row['cpu_s']:7.2f} s")
    about = {"command": "python -m benchmarks.secure_sum", "machine": machine(), "numbers": chosen.numbers}
    write_json(chosen.out, {**about, "rows": rows})
    return 0


def measure(clients: int, numbers: int, graph: str) -> dict[str, Any]:
    """Processor time of one sum, by the options' defaults; the sum is checked."""
    rng, options = np.random.default_rng(0), Secure()
    vectors = {client: rng.integers(0, 2**32, numbers, np.uint32) for client in range(clients)}
    fewest = options.fewest(clients)
    # With as many colluders as that, only the complete graph will do.
    colluders = math.ceil(options.colluding * clients - 1e-9) if graph == "ring" else fewest - 1
    began = time.process_time()
    outcome = aggregate(vectors, fewest, dict.fromkeys(range(clients // 10), "mask"), colluders=colluders)
    took = time.process_time() - began
    if (outcome.total != np.sum([vectors[c] for c in outcome.survivors], axis=0, dtype=np.uint32)).any():
        raise RuntimeError("the sum is wrong")
    reach, shares = sizes(clients, fewest, colluders)
    neighbours = min(2 * reach, clients - 1)
    return {"clients": clients, "graph": graph, "neighbours": neighbours, "shares": shares, "cpu_s": took}


if __name__ == "__main__":
    sys.exit(main())
